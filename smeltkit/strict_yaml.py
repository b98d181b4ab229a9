"""YAML that people write: a key that occurs twice is refused instead of lost."""

from __future__ import annotations

import json
from typing import Any

import yaml


def load_yaml(text: str | bytes) -> Any:
    """The values of one document; YAMLError if it is none, with the lines of a key that occurs twice."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (ValueError, RecursionError) as error:  # of values such as the date 2026-13-01, and of nesting
        raise yaml.YAMLError(str(error)) from error


def no_text(value: Any) -> str:
    """What is wrong with `value` where text belongs, as the end of a sentence about its key, and what to do."""
    if value is None:
        return "has no value; write one"
    if isinstance(value, bool | int | float):
        return f"is read as {json.dumps(value)}, which is no text; put it in quotes"
    return f"is {value!r}; it must be text that is not empty"


class _UniqueKeys(yaml.SafeLoader):
    """Compares keys as they are read, before merges (`<<`) are put in place, whose keys may be said again."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            found, line = self.construct_object(key), key.start_mark.line + 1
            if found in first:
                raise yaml.YAMLError(f"key {found!r} occurs twice, in lines {first[found]} and {line}; remove one")
            first[found] = line
        return node
