"""A small suite in each data format, as files that a test may break."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from services.evaluator.data import DataSource
from services.evaluator.problems import Problem, load_problems
from services.evaluator.suites import Suite, find_suite, load_suite
from smeltkit.blobs.local import LocalStore
from smeltkit.ids import digest_bytes

Row = dict[str, Any]

HUMANEVAL_ROWS: tuple[Row, ...] = (
    {
        "task_id": "Tiny/0",
        "prompt": 'def double(x):\n    """Return x twice.\n    >>> double(2)\n    4\n    """\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    },
    {
        "task_id": "Tiny/1",
        "prompt": "import math\n\n\ndef square(x):\n    return x * x\n\n\n"
        'def root(x):\n    """Return the number whose square is x."""\n',
        "entry_point": "root",
        "canonical_solution": "    return math.sqrt(x)\n",
        "test": "def check(candidate):\n    assert square(candidate(9)) == 9\n",
    },
)
MBPP_ROWS: tuple[Row, ...] = (
    {
        "task_id": 11,
        "text": "Write a function to add two numbers.",
        "code": "def add(a, b):\n    return a + b",
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "challenge_test_list": [],
    },
    {
        "task_id": 12,
        "text": "Write a function to sum a linked list.",
        "code": "import math\nclass Node:\n    def __init__(self, value):\n        self.value = value\n"
        "def total(node):\n    return math.floor(node.value)",
        "test_setup_code": "head = Node(3)",
        "test_list": ["assert total(head) == 3"],
        "challenge_test_list": ["assert total(Node(4)) == 4"],
    },
)


def to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def suite_values(data: bytes, *, format: str = "humaneval", name: str = "tiny") -> Row:
    """The YAML content of a valid suite over `data`."""
    is_chat = format == "mbpp"
    rows = len(data.splitlines())
    first = 11 if is_chat else 0
    return {
        "name": name,
        "version": 1,
        "description": "a suite for tests",
        "data": {
            "file": f"{name}.jsonl",
            "digest": digest_bytes(data),
            "rows": rows,
            "format": format,
            "url": f"https://example.org/{name}.jsonl",
            "licence": "MIT",
        },
        "split": {"name": "all", "first": first, "last": first + rows - 1, "problems": rows},
        "prompt": {"builder": "tests-shown" if is_chat else "completion", "version": 1},
        "extraction": {
            "kind": "chat" if is_chat else "completion",
            "joins": ["reply"] if is_chat else ["append", "newline", "indent", "whole"],
        },
        "generation": {"stop": [] if is_chat else ["\ndef "], "max_tokens": 64, "thinking_tokens": 32},
        "judge": {"form": "asserts" if is_chat else "check", "setup": "after-solution"},
        "references_passed": rows,
    }


def write_suite(folder: Path, values: Row, *, file: str = "tiny.yaml") -> Path:
    """The suite as a YAML file."""
    path = folder / file
    path.write_text(yaml.safe_dump(values))
    return path


def make_suite(
    folder: Path, rows: Sequence[Mapping[str, Any]] = HUMANEVAL_ROWS, format: str = "humaneval"
) -> tuple[Suite, tuple[Problem, ...], bytes]:
    """A loaded suite over `rows`, its problems and its data."""
    data = to_lines(rows)
    suite = load_suite(write_suite(folder, suite_values(data, format=format)))
    return suite, load_problems(suite, data), data


def published_problems(name: str, store_folder: Path) -> tuple[Suite, tuple[Problem, ...]]:
    """A shipped suite with its real data: from beside the repository, else from its published home."""
    suite = find_suite(name)
    folder = Path(__file__).parents[5] / "shared" / "data"
    return suite, load_problems(suite, DataSource(LocalStore(store_folder), folder).read(suite))
