"""Each extra lists exactly the distributions that its service reaches, and torch stays out of where it must not be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"smeltkit", "services", "gateway", "contracts", "smelt", "__future__"}
ROOTS = {
    "importer": "services.importer",
    "trainer": "services.trainer",
    "inference": "services.inference",
    "evaluator": "services.evaluator",
    "sandbox": "services.sandbox",
    "gateway": "gateway",
}
CONTROL = ["gateway.cli.main", "services.sandbox.__main__", "services.evaluator.__main__"]
ENTRY_POINTS = [*CONTROL, "services.importer.__main__", "services.inference.__main__", "services.trainer.__main__"]
HEAVY = {"torch", "triton", "transformers", "peft", "llama_cpp"}
# Imported as another distribution's public surface, or loaded by name at run time.
SAME_AS = {"opentelemetry-exporter-otlp-proto-grpc": "opentelemetry-sdk", "googleapis-common-protos": "protobuf"}


def _name(requirement: str) -> str:
    return re.split(r"[<>=\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "smeltkit", "services", "gateway", "contracts", include_external_packages=True, cache_dir=None
    )


def _reached(package: str) -> set[str]:
    """Top-level third-party modules that `package` reaches through our own modules."""
    graph = _graph()
    own = {module for module in graph.modules if module == package or module.startswith(package + ".")}
    queue, seen = list(own), set(own)
    external: set[str] = set()
    while queue:
        for imported in graph.find_modules_directly_imported_by(queue.pop()):
            top = imported.split(".")[0]
            if top not in OWN:
                external.add(imported)
            elif imported not in seen and top != "smelt":
                seen.add(imported)
                queue.append(imported)
    return {name for name in external if name not in sys.stdlib_module_names}


def _distributions(modules: set[str]) -> set[str]:
    table = packages_distributions()
    table["google"], table["opentelemetry"] = ["protobuf"], ["opentelemetry-api"]
    return {table[module][0].lower().replace("_", "-") for module in modules if module in table}


@pytest.mark.parametrize("extra", ROOTS)
def test_extra_lists_exactly_what_its_service_reaches(extra: str) -> None:
    """A container that installs one extra has all it needs and nothing more."""
    declared = {_name(line) for line in PROJECT["optional-dependencies"][extra]}
    base = {_name(line) for line in PROJECT["dependencies"]}
    reached = _distributions(_reached(ROOTS[extra]))
    assert reached - base - declared == set(), "imported but not declared"
    assert declared - reached == set(), "declared but not imported"


@cache
def _heavy_after() -> dict[str, list[str]]:
    """What each entry point brings with it, all imported in one process: those that may have the engine come last."""
    code = (
        "import importlib, json, sys\n"
        f"heavy, found = {HEAVY}, dict()\n"
        f"for name in {ENTRY_POINTS}:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted(heavy & sys.modules.keys())\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_no_service_of_this_release_imports_torch(module: str) -> None:
    """Importing a service's entry point loads neither torch nor triton; the command line, the sandbox and the evaluator
    do not load llama.cpp either."""
    assert set(_heavy_after()[module]) <= (set() if module in CONTROL else {"llama_cpp"})
