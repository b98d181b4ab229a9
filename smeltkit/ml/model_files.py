"""The small text files of a model folder, read within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from smeltkit import limits
from smeltkit.errors import BadFile, BadModelConfig, BadTemplate

TEMPLATE_FILE: Final = "chat_template.jinja"


def read_json(path: Path, error: type[BadFile] = BadModelConfig) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file; `error` if it is malformed or too large."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path, limits.MODEL_JSON_MAX_BYTES, error))
    except (ValueError, RecursionError) as cause:
        raise error(f"{path.name} is no JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{path.name} holds no JSON object")
    return value


def template_of(folder: Path) -> str | None:
    """The chat template's source: chat_template.jinja, else what tokenizer_config.json holds, else None."""
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        return template_in(read_json(folder / "tokenizer_config.json"))
    try:
        return _read(path, limits.TEMPLATE_MAX_BYTES, BadTemplate).decode()
    except UnicodeDecodeError as error:
        raise BadTemplate(f"{TEMPLATE_FILE} is no UTF-8 text: {error}") from error


def template_in(tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template inside tokenizer_config.json: the only one, or of several the one named `default`."""
    declared = tokenizer_config.get("chat_template")
    if isinstance(declared, list):
        named = {str(item.get("name")): item.get("template") for item in declared if isinstance(item, dict)}
        declared = named.get("default")
    if declared is not None and not isinstance(declared, str):
        raise BadTemplate("tokenizer_config.json: chat_template must be a text or a list of named texts")
    return declared


def _read(path: Path, max_bytes: int, error: type[BadFile]) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise error(f"{path.name} is larger than {max_bytes} bytes")
    return data
