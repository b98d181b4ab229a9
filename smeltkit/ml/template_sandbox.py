"""A jinja2 environment for templates from strangers: they see no objects, and their work is metered.

jinja2's own sandbox keeps templates away from Python's internals but not from time and memory: nested loops, strings
that double, wide padding, a macro that calls itself twice. So every template is rewritten when it is compiled: loops,
macros, comparisons, joins and output report to a meter, which raises `Exceeded` when a render does more than `limits`
allow. Filters and methods are those that chat templates use; what grows its input by a number is left out or checked.

Not covered: a bug in jinja2's parser or in Python itself, and the cost of parsing, which the size of the source bounds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from smeltkit.ml import template_meter
from smeltkit.ml.template_meter import CHARS_PER_STEP, METER, Exceeded, Meter

FILTERS: Final = tuple(
    "abs capitalize count d default dictsort e escape first float indent int items join last length list lower map max"  # noqa: SIM905
    " min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique"
    " upper".split()
)
"""Filters that a template may use."""

STRING_METHODS: Final = tuple(
    "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower lstrip"  # noqa: SIM905
    " partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip"
    " swapcase title upper".split()
)
"""Methods of strings that a template may call."""

_METHODS: Final[dict[type, tuple[str, ...]]] = {
    str: STRING_METHODS,
    list: ("count", "index"),
    tuple: ("count", "index"),
    dict: ("get", "items", "keys", "values"),
    int: (),
    float: (),
    range: (),
}
_STRIPS: Final = ("trim", "strip", "lstrip", "rstrip")
_STRIP_CHARS_MAX: Final = 64
_WIDENING: Final = ("indent", "round", "tojson")
_WIDTH_MAX: Final = 100
_INTEGER_BITS_MAX: Final = 256


class Refused(jinja2.TemplateError):
    """The template itself refuses the messages, by its `raise_exception`."""


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The rendered text; Exceeded, Refused or whatever else the template raises."""
    token = METER.set(Meter())
    try:
        return template.render(variables)
    finally:
        METER.reset(token)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders as `transformers` does: trimmed blocks, loop controls, its globals and its `tojson`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_finalize,
            cache_size=0,
        )
        known: dict[str, Any] = {**self.filters, **_FILTERS}
        self.filters = {name: _metered(name, known[name]) for name in FILTERS}
        self.filters |= {
            "_loop": template_meter.Loop,
            "_touch": _touch,
            "_concat": template_meter.join,
            "_spend": _spend,
        }
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _metered(name, test) for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Parser(self, source, name, filename).parse()
        _Rewriter().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read `attr`: of plain values only the methods listed."""
        allowed = next((methods for kind, methods in _METHODS.items() if isinstance(obj, kind)), None)
        return (allowed is None or attr in allowed) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Never a formatter: a width in a format string makes text of any length."""
        return None

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a macro, a method or a global, metered."""
        meter, owner = METER.get(), getattr(obj, "__self__", None)
        meter.touch("", owner, *args, *kwargs.values())
        if isinstance(owner, str):
            name = obj.__name__
            if name == "join" and len(args) == 1:
                return template_meter.join(args[0], owner)
            if name == "replace":
                return template_meter.replace(owner, *args)
            _check_strip(name, args)
        result = super().call(context, obj, *args, **kwargs)
        meter.touch(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, after its result was found to be of a bounded size."""
        meter = METER.get()
        meter.touch(left, right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting by % is not available in chat templates; use ~")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            meter.check_length(len(left) + len(right))
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                    meter.check_length(len(sequence) * count * (1 if isinstance(sequence, str) else CHARS_PER_STEP))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _INTEGER_BITS_MAX:
                raise Exceeded(f"the template computes a number of more than {_INTEGER_BITS_MAX} bits")
        return super().call_binop(context, operator, left, right)


class _Rewriter(NodeTransformer):
    """Puts the meter into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not available in chat templates", node.lineno)
        weight = nodes.Const(_count_nodes(node))
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_loop", [weight])
        return node

    def _visit_callable(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        spend = nodes.ExprStmt(_filter(nodes.Const(_count_nodes(node)), "_spend"), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, spend)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_callable

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "_touch")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_touch")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "_touch")
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training masks; it renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _filter(node: nodes.Node, name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, arguments or [], [], None, None, lineno=node.lineno)


def _count_nodes(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a filter or test that counts its work and takes no number that could widen its result."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.touch("", *args, *kwargs.values())
        numbers = [value for value in [*args[1:], *kwargs.values()] if isinstance(value, int)]
        if name in _WIDENING and any(abs(number) > _WIDTH_MAX for number in numbers):
            raise Exceeded(f"the filter {name} is given a number above {_WIDTH_MAX}")
        _check_strip(name, [value for value in args if isinstance(value, str)][1:])
        result = function(*args, **kwargs)
        meter.touch(result)
        return result

    return wrapper


def _check_strip(name: str, arguments: Iterable[Any]) -> None:
    """Stripping a set of characters costs text times set."""
    if name in _STRIPS and any(isinstance(value, str) and len(value) > _STRIP_CHARS_MAX for value in arguments):
        raise Exceeded(f"{name} is given a set of more than {_STRIP_CHARS_MAX} characters")


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> str:
    """Every piece of output. That it wants the context keeps jinja2 from evaluating it when compiling."""
    return METER.get().emit(value)


@jinja2.pass_context
def _spend(context: Context, steps: int) -> None:
    METER.get().spend(steps)


@jinja2.pass_context
def _touch(context: Context, value: Any) -> Any:
    METER.get().touch(value)
    return value


def _string(value: Any) -> str:
    return METER.get().to_text(value)


def _raise_exception(message: str) -> None:
    raise Refused(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 64 or re.search(r"%[^a-zA-Z%]", format):
        raise SecurityError(f"strftime_now takes plain codes such as %Y, not {format[:64]!r}")
    return datetime.now().strftime(format)


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "indent": template_meter.indent,
    "join": template_meter.join,
    "replace": template_meter.replace,
    "string": _string,
    "tojson": template_meter.to_json,
}
