"""What a piece of Python says about names, by its syntax tree alone: nothing is ever executed here.

Foreign text is parsed, so every failure of the parser is one answer: `parse` gives None.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def parse(text: str) -> ast.Module | None:
    """The tree of `text`; None where it does not parse."""
    tree = try_parse(text)
    return tree if isinstance(tree, ast.Module) else None


def try_parse(text: str) -> ast.Module | int:
    """The tree of `text`, or the number of the line (from 1) at which the parser gave up."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1


def lines(text: str) -> list[str]:
    """The lines of `text` with their ends, counted as the parser counts them: form feeds and the like end none."""
    return _LINE.findall(text)


def identifiers(text: str) -> frozenset[str]:
    """Every word of `text` that could be a name, in code or in prose."""
    return frozenset(_IDENTIFIER.findall(text))


def defined(tree: ast.Module) -> frozenset[str]:
    """Functions and classes that the module defines at top level."""
    return frozenset(node.name for node in tree.body if isinstance(node, _DEFINITIONS))


def bound(tree: ast.Module) -> frozenset[str]:
    """Names that the module itself makes at top level; imports are not its own."""
    return defined(tree) | frozenset(
        node.id for node in _top_level(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )


def read(tree: ast.Module) -> frozenset[str]:
    """Names that are read anywhere in the module."""
    return frozenset(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )


def called(tree: ast.Module) -> frozenset[str]:
    """Names that are called anywhere in the module."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return frozenset(function.id for function in calls if isinstance(function, ast.Name))


def has_body(tree: ast.Module, name: str) -> bool:
    """Whether the last function `name` at top level does more than carry a docstring."""
    function = next(
        (node for node in reversed(tree.body) if isinstance(node, _DEFINITIONS) and node.name == name), None
    )
    if function is None:
        return False
    return len(function.body) > (ast.get_docstring(function, clean=False) is not None)


def without(text: str, name: str) -> str:
    """`text` without the top-level definition of `name`, its decorators included; it must parse."""
    kept = lines(text)
    for node in reversed(ast.parse(text).body):
        if isinstance(node, _DEFINITIONS) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            del kept[first - 1 : node.end_lineno]
    return "".join(kept)


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that is not inside a function or class."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_DEFINITIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            waiting.extend(ast.iter_child_nodes(node))
