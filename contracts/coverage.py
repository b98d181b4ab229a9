"""Which requirement is decided by which test: `python -m contracts.coverage [--report JUNIT_XML]`.

A test decides a requirement by naming its id, e.g. R-121, in its docstring, or in that of its class or module. With a
JUnit report only tests that ran and passed count. The exit status is 1 if a test names an id that does not exist;
uncovered requirements of built components are shown, not punished.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import yaml

from smeltkit.errors import BadConfig

ROOT: Final = Path(__file__).resolve().parent.parent
REGISTRY: Final = Path(__file__).resolve().parent / "requirements.yaml"
_ID = re.compile(r"\bR-\d{3}\b")
_SHOWN_TESTS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One promise: its id, the sentence, the component that answers for it, and whether that is built."""

    id: str
    text: str
    component: str
    is_built: bool


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A test that names an id: its node id, e.g. tests/unit/test_a.py::test_b."""

    id: str
    test: str


def read_requirements(path: Path = REGISTRY) -> dict[str, Requirement]:
    """Requirements by id; BadConfig names the entry that is malformed or belongs to no component."""
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text())
        components = {name: bool(row["is_built"]) for name, row in content["components"].items()}
        rows = content["requirements"].items()
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(f"{path.name} does not parse: {error}") from error
    found: dict[str, Requirement] = {}
    for id, row in rows:
        if not _ID.fullmatch(id) or set(row) != {"component", "text"} or row["component"] not in components:
            raise BadConfig(f"{path.name}: {id} needs the form R-nnn, a text and one of {sorted(components)}")
        component = row["component"]
        found[id] = Requirement(id=id, text=row["text"], component=component, is_built=components[component])
    return found


def find_mentions(folder: Path) -> list[Mention]:
    """Every id that a test under `folder` names, by file and order of appearance."""
    found: list[Mention] = []
    for path in sorted(folder.rglob("test_*.py")):
        name = path.relative_to(folder.parent).as_posix()
        module = ast.parse(path.read_text())
        found += [Mention(id=id, test=f"{name}::{test}") for id, test in _mentions(module, "", _ids(module))]
    return found


def read_passed(report: Path) -> set[str]:
    """Node ids (without parameters) of the tests that passed in a JUnit report, none of whose cases failed."""
    passed: set[str] = set()
    failed: set[str] = set()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '').partition('[')[0]}"
        is_passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        (passed if is_passed else failed).add(name)
    return passed - failed


def covered(mentions: Sequence[Mention], passed: set[str] | None) -> dict[str, list[str]]:
    """Test ids by requirement; with `passed` only those that did."""
    found: dict[str, list[str]] = {}
    for mention in mentions:
        dotted = mention.test.replace(".py::", ".").replace("::", ".").replace("/", ".")
        if passed is None or dotted in passed:
            found.setdefault(mention.id, []).append(mention.test)
    return found


def render(requirements: Mapping[str, Requirement], tests: Mapping[str, Sequence[str]]) -> str:
    """The table for people: each requirement of a built component with its tests, then the count, never a verdict."""
    lines: list[str] = []
    built = [requirement for requirement in requirements.values() if requirement.is_built]
    for requirement in sorted(built, key=lambda requirement: (requirement.component, requirement.id)):
        names = tests.get(requirement.id, [])
        mark = f"{len(names):4d}" if names else "   -"
        lines.append(f"{requirement.id}  {requirement.component:<10}{mark}  {requirement.text}")
        lines += [f"{'':26}{name}" for name in names[:_SHOWN_TESTS]]
        if len(names) > _SHOWN_TESTS:
            lines.append(f"{'':26}and {len(names) - _SHOWN_TESTS} more")
    open_ids = [requirement.id for requirement in built if requirement.id not in tests]
    later = len(requirements) - len(built)
    lines += [
        "",
        f"{len(built) - len(open_ids)} of {len(built)} requirements of built components are decided by a test",
    ]
    lines += [f"undecided: {', '.join(open_ids) or 'none'}", f"{later} wait for components that are not built yet"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Prints the table; 1 if a test names an id that is not in the registry, 2 for wrong use."""
    if arguments and (len(arguments) != 2 or arguments[0] != "--report"):
        sys.stderr.write("usage: python -m contracts.coverage [--report JUNIT_XML]\n")
        return 2
    requirements, mentions = read_requirements(), find_mentions(ROOT / "tests")
    passed = read_passed(Path(arguments[1])) if arguments else None
    sys.stdout.write(render(requirements, covered(mentions, passed)))
    unknown = [mention for mention in mentions if mention.id not in requirements]
    for mention in unknown:
        sys.stderr.write(f"{mention.test} names {mention.id}, which {REGISTRY.name} does not know\n")
    return 1 if unknown else 0


def _mentions(parent: ast.AST, prefix: str, inherited: frozenset[str]) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from _mentions(node, f"{prefix}{node.name}::", inherited | _ids(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for id in sorted(inherited | _ids(node)):
                yield id, f"{prefix}{node.name}"


def _ids(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    return frozenset(_ID.findall(ast.get_docstring(node) or ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
