"""Where an artifact comes from: the operation, its inputs by digest, its parameters and the code that ran.

A lineage is stored with the artifact and travels to other people, so it holds nothing of the machine it was made on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from smeltkit.errors import BadDigest, BadManifest
from smeltkit.ids import is_digest

_HOST_PATH: Final = re.compile(r"(?<![\w:/.-])(/|~/|[A-Za-z]:\\|\\\\)[\w.~-]|file:", re.ASCII)
_SECRET: Final = re.compile(r"://[^/\s]*@|\b(hf_|sk-|ghp_)[A-Za-z0-9]{16,}")
_OPERATION: Final = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """How an artifact was made. Equal lineages of one operation mean equal results, as far as it is deterministic."""

    operation: str
    """Verb, e.g. `import` or `quantize`."""
    inputs: tuple[str, ...] = ()
    """Digests of the artifacts that went in."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the result depends on, as plain JSON values."""
    code_revision: str
    """Version or commit of the code that ran."""
    origin: str = ""
    """For the first artifact of a line: where it came from outside, e.g. `hf://ORG/NAME@COMMIT`."""

    def __post_init__(self) -> None:
        if not _OPERATION.fullmatch(self.operation):
            raise BadManifest(f"lineage: operation {self.operation!r} must be a word in lower case")
        if not self.code_revision:
            raise BadManifest("lineage: code_revision is empty; name the version or commit that ran")
        bad = [digest for digest in self.inputs if not is_digest(digest)]
        if bad:
            raise BadDigest(
                f"lineage: input {bad[0]!r} is no digest; inputs are named by digest, never by name or path"
            )
        for text in _texts(self.to_dict()):
            if _HOST_PATH.search(text) or _SECRET.search(text):
                raise BadManifest(
                    f"lineage holds a host path or a credential: {text[:80]!r}; record a digest, a name or"
                    " a URL without user instead"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest or lineage.json."""
        return {
            "operation": self.operation,
            "inputs": list(self.inputs),
            "parameters": dict(self.parameters),
            "code_revision": self.code_revision,
            "origin": self.origin,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Lineage:
        """The lineage of `to_dict`; BadManifest if it is malformed."""
        try:
            json.dumps(value, allow_nan=False)
            return cls(
                operation=value["operation"],
                inputs=tuple(value["inputs"]),
                parameters=dict(value["parameters"]),
                code_revision=value["code_revision"],
                origin=value["origin"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadManifest(f"lineage.json is malformed: {error!r}") from error


def _texts(value: Any) -> Iterator[str]:
    """Every text inside plain JSON values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
