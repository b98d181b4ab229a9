"""Texts whose perplexity is measured: one YAML file each, read strictly, named like suites and asked for like them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from services.evaluator.fields import Fields
from services.evaluator.suites import DataFile, read_data_file, read_yaml, suites
from smeltkit import limits
from smeltkit.errors import BadSuite
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json


@dataclass(frozen=True, kw_only=True)
class Text:
    """Everything that a perplexity on this text depends on besides the model. `digest` names all of it."""

    name: str
    version: int
    description: str
    data: DataFile
    size_bytes: int
    window_tokens: int
    """Tokens that the model sees at once: those that count and those before them."""
    stride_tokens: int
    """Tokens of a window that count, all but the first window's; the others are their context."""
    digest: str


def texts() -> Mapping[str, Text]:
    """The texts of this release by name; BadSuite if one of them is malformed or has the name of a suite."""
    return _load_folder(Path(__file__).parent)


def load_text(path: Path) -> Text:
    """The text of one YAML file; BadSuite names the file, the field and what is wrong."""
    value = read_yaml(path)
    top = Fields(path.name, value)
    data = top.section("data")
    window_tokens = top.integer("window_tokens", 2, limits.EVALUATION_TOKENS_MAX)
    text = Text(
        name=top.text("name"),
        version=top.integer("version", 1, limits.SUITE_ROWS_MAX),
        description=top.text("description"),
        size_bytes=data.integer("size_bytes", 1, limits.TEXT_MAX_BYTES),
        data=read_data_file(data),
        window_tokens=window_tokens,
        stride_tokens=top.integer("stride_tokens", 1, window_tokens),
        digest=digest_bytes(canonical_json(value)),
    )
    data.close()
    top.close()
    if text.name != path.stem:
        top.fail("name", f"is {text.name!r}, must be the file's name {path.stem!r}")
    return text


@cache
def _load_folder(folder: Path) -> Mapping[str, Text]:
    found = {text.name: text for text in (load_text(path) for path in sorted(folder.glob("*.yaml")))}
    twice = sorted(found.keys() & suites().keys())
    if twice:
        raise BadSuite(f"{twice[0]}.yaml: field 'name' is that of a suite")
    return found
