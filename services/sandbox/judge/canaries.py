"""From a unittest module to what is sent to the candidate's process: tests under random names, and canaries among them.

A canary is a test that must fail: a wrong equality, a missing exception, and a real test whose expectation was altered.
Which names are canaries is known only here; one that passes shows that something in that process says `passed` without
reason.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from services.sandbox.judge.outcome import Refused

_BASES: Final = frozenset(("TestCase", "IsolatedAsyncioTestCase"))
_EQUALITIES: Final[dict[str, type]] = {
    "assertEqual": object,
    "assertEquals": object,
    "assertAlmostEqual": float,
    "assertSequenceEqual": list,
    "assertListEqual": list,
    "assertTupleEqual": tuple,
    "assertDictEqual": dict,
    "assertSetEqual": set,
    "assertMultiLineEqual": str,
    "assertCountEqual": list,
}
"""Assertion to the type that it demands of both sides."""
_TOKEN_BITS: Final = 64
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Planned(NamedTuple):
    """One test to ask for: where it is, what it was called, and whether it must fail."""

    class_name: str
    method: str
    original: str
    is_canary: bool


class Plan(NamedTuple):
    """The source to send, and the tests in the order to ask for them."""

    source: str
    order: list[Planned]


def plan_tests(source: str, chance: random.Random) -> Plan:
    """Random names and places come from `chance`; Refused if there is no test case or one says that it is skipped."""
    try:
        tree = ast.parse(source)
        classes = _test_classes(tree)
        methods = {name: _methods_of(name, classes) for name in sorted(classes)}
        real = [(name, method) for name in methods for method in sorted(methods[name])]
        if not real:
            raise Refused("the tests define no unittest case")
        _refuse_skips(tree)
        names = {method: _token(chance) for _, method in real}
        order = [Planned(name, names[method], method, False) for name, method in real]
        canaries = [*_fixed_canaries(sorted(methods), chance), *_altered_canaries(classes, methods, chance)]
        _Renamer(names).visit(tree)
        for class_name, canary in canaries:
            classes[class_name].body.append(canary)
            place = chance.randrange(len(order) + 1)
            order.insert(place, Planned(class_name, canary.name, "a canary", True))
        return Plan(ast.unparse(ast.fix_missing_locations(tree)), order)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Refused(f"tests do not compile: {type(error).__name__}: {error}") from error


def _test_classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    found: dict[str, ast.ClassDef] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(_last_name(base) in (*_BASES, *found) for base in node.bases):
            found[node.name] = node
    return found


def _methods_of(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, _Function]:
    """The class's test methods by name, inherited ones of this module included."""
    found: dict[str, _Function] = {}
    for base in reversed(classes[name].bases):
        if _last_name(base) in classes:
            found.update(_methods_of(_last_name(base), classes))
    for node in classes[name].body:
        if isinstance(node, _Function) and node.name.startswith("test"):
            found[node.name] = node
    return found


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _refuse_skips(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", ()):
            name = _last_name(decorator.func if isinstance(decorator, ast.Call) else decorator)
            if name.startswith("skip") or name in ("expectedFailure", "expand", "parameterized"):
                raise Refused(f"the tests use {name}; a test that is skipped, fails or is renamed cannot be counted")


def _fixed_canaries(class_names: list[str], chance: random.Random) -> Iterator[tuple[str, _Function]]:
    """A wrong equality and a missing exception."""
    one, other = chance.getrandbits(16), chance.getrandbits(16) | 1 << 16
    bodies = (f"self.assertEqual({one}, {other})", "with self.assertRaises(ValueError):\n        pass")
    for body in bodies:
        function = ast.parse(f"def {_token(chance)}(self):\n    {body}\n").body[0]
        assert isinstance(function, _Function)
        yield chance.choice(class_names), function


def _altered_canaries(
    classes: dict[str, ast.ClassDef], methods: dict[str, dict[str, _Function]], chance: random.Random
) -> Iterator[tuple[str, _Function]]:
    """Copies of one real test in which one side of an equality is a value that nothing honest equals."""
    places = [
        (class_name, function)
        for class_name in sorted(methods)
        for function in methods[class_name].values()
        if isinstance(function, ast.FunctionDef) and any(True for _ in _equalities(function.body))
    ]
    if not places:
        return
    class_name, function = chance.choice(places)
    for side in _sides_to_alter(next(_equalities(function.body))):
        canary = copy.deepcopy(function)
        canary.name = _token(chance)
        arguments, demanded = next(_equalities(canary.body))
        arguments[side] = _value_of(demanded, arguments[1 - side], chance)
        yield class_name, canary


def _equalities(body: list[ast.stmt]) -> Iterator[tuple[list[ast.expr], type]]:
    """Both sides of every equality that is reached in any case, with the type that it demands."""
    for statement in body:
        if any(isinstance(node, ast.Return | ast.Raise | ast.Yield) for node in ast.walk(statement)):
            return
        if isinstance(statement, ast.With | ast.AsyncWith):
            if not any(_swallows(item.context_expr) for item in statement.items):
                yield from _equalities(statement.body)
        elif isinstance(statement, ast.Assert) and _is_equality(statement.test):
            yield _Sides(statement.test), object
        elif isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
            demanded = _EQUALITIES.get(_last_name(call.func))
            if demanded is not None and len(call.args) >= 2:
                yield call.args, demanded
            elif _last_name(call.func) == "assertTrue" and call.args and _is_equality(call.args[0]):
                yield _Sides(call.args[0]), object


class _Sides(list[ast.expr]):
    """The two sides of a comparison; setting one changes the comparison."""

    def __init__(self, compare: Any) -> None:
        super().__init__([compare.left, compare.comparators[0]])
        self._compare = compare

    def __setitem__(self, side: Any, value: Any) -> None:
        super().__setitem__(side, value)
        self._compare.left, self._compare.comparators = self[0], [self[1]]


def _is_equality(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq)


def _swallows(context: ast.expr) -> bool:
    name = _last_name(context.func if isinstance(context, ast.Call) else context).lower()
    return any(word in name for word in ("raises", "warns", "suppress"))


def _sides_to_alter(equality: tuple[list[ast.expr], type]) -> tuple[int, ...]:
    """The side that is written down as a value; both, one canary each, where neither is."""
    literal = tuple(side for side in (0, 1) if _literal(equality[0][side]) is not None)
    return literal[:1] if len(literal) == 1 else (0, 1)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _value_of(demanded: type, other: ast.expr, chance: random.Random) -> ast.expr:
    """A value of the demanded type that equals nothing else, as an expression."""
    word, number = _token(chance), float(chance.getrandbits(48))
    kind = type(_literal(other)) if demanded is object else demanded
    values: dict[type, object] = {
        list: [word], tuple: (word,), dict: {word: word}, set: {word}, str: word, float: number + 0.5
    }  # fmt: skip
    return ast.parse(repr(values.get(kind, int(number))), mode="eval").body


class _Renamer(ast.NodeTransformer):
    """Gives tests their new names, where they are defined and where they are named as attributes."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A method, maybe a test."""
        node.name = self._names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        """As `visit_FunctionDef`."""
        node.name = self._names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Perhaps one test that calls another."""
        node.attr = self._names.get(node.attr, node.attr)
        return self.generic_visit(node)


def _token(chance: random.Random) -> str:
    return f"test_{chance.getrandbits(_TOKEN_BITS):016x}"
