"""What is installed is what is written down: every distribution that this project reaches has one pinned version."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.install_llama import VERSION

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
}
OURS = {"smelt", "smelt-proto"}
COMPILED_HERE = {"llama-cpp-python"}
"""Built from its pinned source by scripts/install_llama.py."""
BUILDERS = {"cmake", "hatchling", "ninja", "pip", "scikit-build-core", "tomlkit", "trove-classifiers"}
"""What builds our own packages and the engine, in environments that pip makes for it."""
TEST_FOLDERS = {"benchmarks", "contracts", "gateway", "scripts", "services", "smelt", "smeltkit", "tests"}


@cache
def _closure() -> frozenset[str]:
    """Names of all distributions that `pip install smelt[dev]` installs on this machine, ours left out."""
    waiting = [Requirement("smelt[dev]"), Requirement("smelt-proto")]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            declared = map(Requirement, distribution(name).requires or ())
            waiting += [one for one in declared if one.marker is None or one.marker.evaluate({"extra": extra})]
    return frozenset(name for name, _ in seen) - OURS


def test_every_distribution_that_is_reached_is_pinned_and_installed_so() -> None:
    """R-128: a fresh clone gets the very versions that were tested, the dependencies of dependencies included."""
    # torch brings libraries of a GPU vendor with it, each pinned by torch's own wheel.
    reached = {name for name in _closure() if not name.startswith(("nvidia-", "cuda-")) and name != "triton"}
    assert len(reached) > 50
    unpinned = sorted(reached - set(PINS) - COMPILED_HERE)
    assert not unpinned, f"not in constraints.txt: {unpinned}"
    differ = {name for name in reached - COMPILED_HERE if distribution(name).version.split("+")[0] != PINS[name]}
    assert not differ, f"installed in another version than pinned: {sorted(differ)}"


def test_every_pin_is_one_exact_version_of_something_that_is_reached() -> None:
    """R-128: a pin that nothing needs would hide that something else is missing."""
    assert all(re.fullmatch(r"[0-9][0-9a-z.+]*", version) for version in PINS.values())
    assert sorted(set(PINS) - _closure()) == sorted(BUILDERS)


def test_the_engine_is_one_version_wherever_it_is_named() -> None:
    """R-128: the version that is compiled is the version that the extras ask for."""
    extras = PROJECT["optional-dependencies"].values()
    named = {line for lines in extras for line in lines if line.startswith("llama-cpp-python")}
    assert named == {f"llama-cpp-python=={VERSION}"}
    assert distribution("llama-cpp-python").version == VERSION


def test_tests_import_only_what_is_pinned() -> None:
    """R-128: no test rests on something that happens to be on the machine, or passes itself over without it."""
    table, beside = packages_distributions(), {path.stem for path in (ROOT / "tests").rglob("*.py")}
    foreign = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            foreign |= {name.partition(".")[0] for name in names}
            assert not (isinstance(node, ast.Attribute) and node.attr == "importorskip"), path
    foreign -= set(sys.stdlib_module_names) | TEST_FOLDERS | beside
    known = {
        module for module in foreign if any(canonicalize_name(name) in _closure() for name in table.get(module, ()))
    }
    assert foreign - known == set()


def test_ci_builds_with_the_pins() -> None:
    """R-128: what CI runs installs, and builds what it installs, under the pins and needs no other verb."""
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs and all("$(PINS)" in line or "-r scripts/proto-constraints.txt" in line for line in installs)
    assert "PINS := -c constraints.txt" in makefile and "--build-constraint constraints.txt" in makefile
    assert re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == ["install", "check", "test"]
