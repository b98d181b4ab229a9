"""Costs of jobs as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType

from gateway.cli.output import human_bytes, human_time, table

if TYPE_CHECKING:
    from gateway.cli.costs import JobCost
    from gateway.cli.prices import PriceConfig


def costs_view(costs: Iterable[JobCost], prices: PriceConfig) -> RenderableType:
    """A line a cost; a dash for what was not measured."""
    rows = (
        (
            cost.name,
            cost.kind,
            cost.tenant,
            cost.state,
            cost.jobs,
            "-" if cost.time_s is None else human_time(cost.time_s),
            "-" if cost.gpu_s is None else human_time(cost.gpu_s),
            "-" if cost.tokens is None else f"{cost.tokens:,}",
            "-" if cost.size_bytes is None else human_bytes(cost.size_bytes),
            _money(cost.price(prices)),
        )
        for cost in costs
    )
    price = f">{prices.currency or 'price'}"
    return table(("", "work", "tenant", "state", ">jobs", ">time", ">GPU time", ">tokens", ">bytes", price), rows)


def _money(price: float | None) -> str:
    return "-" if price is None else f"{price:.2f}" if price >= 1 else f"{price:.4f}"
