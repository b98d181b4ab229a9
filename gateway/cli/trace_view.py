"""A trace as a tree: who called whom, when, for how long, and what failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text
from rich.tree import Tree

from gateway.cli.output import human_time
from smeltkit.telemetry import SpanRecord, names

_SIBLINGS_SHOWN = 6


def trace_document(trace_id: str, spans: Sequence[SpanRecord]) -> dict[str, Any]:
    """The spans for machines, by start time."""
    return {"trace_id": trace_id, "spans": [{**asdict(span), "attributes": dict(span.attributes)} for span in spans]}


def trace_tree(spans: Sequence[SpanRecord], depth: int) -> Tree:
    """The tree of one trace, `depth` levels of it.

    Many alike siblings become one line; a span without its parent hangs at the root.
    """
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start_ns):
        children[span.parent_id if span.parent_id in known else ""].append(span)
    start_ns = min(span.start_ns for span in spans)
    services = len({span.service for span in spans})
    tree = Tree(Text(f"trace {spans[0].trace_id}: {len(spans)} spans of {services} services"))
    _grow(tree, children, children[""], start_ns, depth)
    return tree


def _grow(
    tree: Tree, children: dict[str, list[SpanRecord]], siblings: list[SpanRecord], start_ns: int, depth: int
) -> None:
    if depth == 0:
        return
    groups: dict[tuple[str, str, str], list[SpanRecord]] = defaultdict(list)
    for span in siblings:
        groups[span.service, span.name, span.kind].append(span)
    for alike in groups.values():
        shown = alike if len(alike) <= _SIBLINGS_SHOWN else alike[:1]
        for span in shown:
            _grow(tree.add(_line(span, start_ns)), children, children[span.span_id], start_ns, depth - 1)
        if rest := alike[len(shown) :]:
            tree.add(_summary(rest))


def _line(span: SpanRecord, start_ns: int) -> Text:
    line = Text.assemble((span.service, "cyan"), "  ", span.name, "  ", (human_time(_seconds(span)), "bold"))
    line.append(f"  +{human_time((span.start_ns - start_ns) / 1e9)}", "dim")
    code = str(span.attributes.get(names.RPC_STATUS, ""))
    cause = str(span.attributes.get(names.ERROR_TYPE, ""))
    if span.status == "ERROR" or code not in ("", "OK"):
        line.append(f"  {' '.join(filter(None, dict.fromkeys((code, cause))))}", "red")
    return line


def _summary(spans: list[SpanRecord]) -> Text:
    times = sorted(_seconds(span) for span in spans)
    failed = sum(span.status == "ERROR" for span in spans)
    text = f"  {len(spans)} more, median {human_time(times[len(times) // 2])}, longest {human_time(times[-1])}"
    line = Text.assemble((spans[0].service, "cyan"), "  ", spans[0].name, (text, "dim"))
    return line.append(f"  {failed} failed", "red") if failed else line


def _seconds(span: SpanRecord) -> float:
    return (span.end_ns - span.start_ns) / 1e9
