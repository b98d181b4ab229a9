"""No production path answers with made-up data: nothing of the tests is within reach, and nothing pretends to work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted(
    path
    for package in ("smeltkit", "services", "gateway", "contracts")
    for path in (ROOT / package).rglob("*.py")
    if not path.is_relative_to(ROOT / "smeltkit" / "testing")
)
MADE_UP = re.compile(
    r"\b(lorem|dummy|placeholders?|fakes?|coming soon|todo)\b"
    r"|\b(mock|sample|demo|stub|example) (data|answer|reply|response|result)"
)


def _outside_docstrings(tree: ast.Module) -> Iterator[str]:
    """String literals that code uses; docstrings and explanations of fields are none."""
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_of_the_product_is_made_up(path: Path) -> None:
    """R-012: no literal of the code stands for data that somebody should have supplied."""
    found = [text for text in _outside_docstrings(ast.parse(path.read_text())) if MADE_UP.search(text.lower())]
    assert not found


def test_nothing_of_the_tests_is_within_reach_of_the_product() -> None:
    """R-012: no service can serve a fake, because none imports one, however indirectly."""
    graph = grimp.build_graph(
        "smeltkit", "services", "gateway", "contracts", include_external_packages=True, cache_dir=None
    )
    fakes = {"smeltkit.testing", *graph.find_descendants("smeltkit.testing")}
    own = {module for module in graph.modules if not graph.is_module_squashed(module)} - fakes
    guilty = {
        (module, imported)
        for module in own
        for imported in graph.find_modules_directly_imported_by(module)
        if imported in fakes or imported.split(".")[0] in {"tests", "unittest", "pytest", "hypothesis"}
    }
    assert guilty <= {("services.sandbox.judge.unittest_form", "unittest")}, "the judge runs unittest suites"
