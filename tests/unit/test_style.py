"""The house rules that no linter knows: sizes of files and functions, ASCII comments, docstrings on public names."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("smeltkit", "services", "gateway", "contracts", "scripts", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILE_LINES_MAX, FUNCTION_LINES_MAX = 400, 70


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _lacks_docstring(tree: ast.Module) -> list[str]:
    """Public classes and functions of a module, and public methods of public classes, without a docstring."""
    lacking: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                lacking.append(node.name)
            is_servicer = isinstance(node, ast.ClassDef) and any("Servicer" in ast.unparse(base) for base in node.bases)
            if isinstance(node, ast.ClassDef) and not is_servicer:
                methods = [item for item in _functions(node) if item in node.body and not item.name.startswith("_")]
                lacking += [f"{node.name}.{item.name}" for item in methods if ast.get_docstring(item) is None]
    return lacking


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_follows_the_house_rules(path: Path) -> None:
    """Files up to 400 lines, functions up to 70, every argument typed, ASCII comments, documented public names."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= FILE_LINES_MAX, f"{text.count(chr(10))} lines"
    for function in _functions(tree):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= FUNCTION_LINES_MAX, f"{function.name} has {lines} lines"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not untyped, f"{function.name}: untyped {untyped}"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            assert token.string.isascii(), f"line {token.start[0]}: {token.string}"
    if text.strip():
        assert ast.get_docstring(tree), "module without a docstring"
    assert not _lacks_docstring(tree)


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by their file name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__.py", "conftest.py")] == []


def test_only_the_config_module_reads_the_environment() -> None:
    """Settings have one door, so an unread variable can be refused. The zygote only takes one out."""
    doors = [ROOT / "smeltkit" / "config.py", ROOT / "services" / "sandbox" / "jail" / "zygote.py"]
    guilty = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("scripts", "benchmarks") or path in doors:
            continue
        text = path.read_text()
        if "environ" not in text and "getenv" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("environ", "getenv")
                and ast.unparse(node.value) == "os"
            ):
                guilty.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not guilty
