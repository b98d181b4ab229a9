"""Courses of the loss of several runs on one axis of tokens and one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from rich.console import RenderableType

from gateway.cli.output import table
from gateway.cli.runs_view import LEVELS, WIDTH

_TOLD: Final = 4
"""Places of the axis at which losses are told as numbers."""


def curves_document(curves: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The mean loss of each run's steps in equal parts of the tokens of the longest: `tokens` at the end of each part,
    `losses` of each run, None where it has no step there; all of them empty if a run has no step."""
    cells = min(WIDTH, *(-(-len(steps) // 2) for steps in curves))  # half as many as steps: none is empty by chance
    if not cells:
        return {"tokens": [], "losses": [[] for _ in curves]}
    most = max(steps[-1]["tokens"] for steps in curves)
    losses = []
    for steps in curves:
        parts: list[list[float]] = [[] for _ in range(cells)]
        for step in steps:
            parts[min((step["tokens"] - 1) * cells // most, cells - 1)].append(step["loss"])
        losses.append([fmean(part) if part else None for part in parts])
    return {"tokens": [most * (number + 1) // cells for number in range(cells)], "losses": losses}


def curves_view(names: Sequence[str], found: Mapping[str, Any]) -> RenderableType:
    """A line a run: its course as blocks, of one scale for all, and its loss at some of the places."""
    known = [loss for losses in found["losses"] for loss in losses if loss is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    cells = len(found["tokens"])
    places = sorted({cells * number // _TOLD - 1 for number in range(1, _TOLD + 1)} - {-1})
    rows = [
        (
            name,
            "".join(" " if loss is None else LEVELS[round((loss - low) * scale)] for loss in losses),
            *("n/a" if losses[place] is None else f"{losses[place]:.4f}" for place in places),
        )
        for name, losses in zip(names, found["losses"], strict=True)
    ]
    return table(("loss", "by tokens seen", *(f">{found['tokens'][place]:,}" for place in places)), rows)
