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

from scripts import cuda_pins
from scripts.images.catalogue import CONTAINERFILE
from scripts.install_llama import VERSION

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS, CUDA_PINS = cuda_pins.pins_of(cuda_pins.PINS), cuda_pins.pins_of(cuda_pins.CUDA_PINS)
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
    pins = CUDA_PINS | PINS
    reached = _closure() - COMPILED_HERE
    assert len(reached) > 50
    assert not reached - set(pins), f"pinned nowhere: {sorted(reached - set(pins))}"
    differ = {name for name in reached if distribution(name).version.split("+")[0] != pins[name]}
    assert not differ, f"installed in another version than pinned: {sorted(differ)}"


def test_torch_with_cuda_and_without_stand_under_pins_that_agree() -> None:
    """R-128: the registry's torch finds the triton that it asks for; another torch needs `scripts.cuda_pins` again."""
    assert {name: CUDA_PINS[name] for name in set(CUDA_PINS) & set(PINS)} == {
        name: PINS[name] for name in cuda_pins.SHARED
    }
    asked = [one for one in map(Requirement, distribution("torch").requires or ()) if one.name in CUDA_PINS]
    assert [str(one) for one in asked if CUDA_PINS[one.name] not in one.specifier] == []
    assert {"nvidia-cudnn-cu13", "cuda-toolkit"} <= set(CUDA_PINS)


def test_images_and_developers_install_under_both_files_of_pins() -> None:
    """R-128: pip itself refuses where they disagree."""
    assert 'ENV PIP_CONSTRAINT="/src/constraints.txt /src/constraints-cuda.txt"' in CONTAINERFILE.read_text()
    assert "PINS := -c constraints.txt -c constraints-cuda.txt" in (ROOT / "Makefile").read_text()


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
    assert "--build-constraint constraints.txt" in makefile
    assert re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == ["install", "check", "test"]
