"""Which columns of a data file become the rows of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """Columns (keys, of JSONL) by what they hold: one of text, messages and ids, or a prompt and its response."""

    text: str = ""
    """A text, all of which is learnt."""
    messages: str = ""
    """A conversation; not in CSV or TSV."""
    ids: str = ""
    """Token ids; not in CSV or TSV."""
    prompt: str = ""
    """What a user asks."""
    response: str = ""
    """The answer, which is learnt."""
    system: str = ""
    """What stands before the prompt, with prompt only; left out of a row where it is empty."""

    def __post_init__(self) -> None:
        kinds = [key for key in ("text", "messages", "ids") if getattr(self, key)]
        named = [key for key in ("system", "prompt", "response") if getattr(self, key)]
        if named:
            if lacking := [key for key in ("prompt", "response") if key not in named]:
                raise BadConfig(
                    f"columns names {' and '.join(named)} without {' and '.join(lacking)}; prompt and response go"
                    " together, and system goes with both"
                )
            kinds.append("prompt")
        if len(kinds) > 1:
            raise BadConfig(f"columns name {' and '.join(kinds)}; a row holds one of text, messages, ids and prompt")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read; none where nothing is said."""
        return tuple(dict.fromkeys(name for name in dataclasses.astuple(self) if name))

    def row(self, found: Mapping[str, Any], where: Callable[[str], Exception]) -> dict[str, Any]:
        """A row as it is learnt, from its columns; what `where` makes of a column that it lacks is raised."""
        if missing := next((name for name in self.names if name not in found), None):
            raise where(missing)
        if not self.prompt:
            return {key: found[name] for key in ("text", "messages", "ids") if (name := getattr(self, key))}
        roles = {"system": self.system, "user": self.prompt, "assistant": self.response}
        messages = [{"role": role, "content": found[name]} for role, name in roles.items() if name]
        return {"messages": [one for one in messages if one["role"] != "system" or one["content"]]}
