"""What of a training's numbers is told when it happens: declared in its file, or what every run is watched for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from services.trainer.settings.ranges import among, within
from smeltkit.errors import BadConfig

ALERT_METRICS: Final[Mapping[str, float]] = {
    "loss": math.inf,
    "grad_norm": math.inf,
    "learning_rate": 1.0,
    "tokens_per_second": math.inf,
    "memory_share": 1.0,
    "mfu": 1.0,
}
"""Metric of a step that alerts can watch to the most that it can be; none is below 0."""
_ALERT_BOUNDS: Final = {"spike": (1.0, 100.0), "drop": (0.01, 0.99), "constant": (0.0, 0.0), "silent": (1.0, 1e6)}


@dataclass(frozen=True, kw_only=True)
class AlertSettings:
    """Something in a run's numbers that is told when it happens, while the run goes on."""

    metric: str = ""
    """loss, grad_norm, learning_rate, tokens_per_second, memory_share (of the GPU or the machine), mfu; or step."""
    when: str = ""
    """above or below `value`; spike: `value` deviations above its course; drop: below `value` of its course; constant:
    one and the same number; silent, of step: none for `value` seconds."""
    value: float = 0.0
    """What the metric is held against; of constant none."""
    steps: int = 1
    """Steps in a row for which it must hold, 1 to 10000."""

    def __post_init__(self) -> None:
        where = f"alerts: {self.metric} {self.when}:"
        among("alerts: metric", self.metric, (*ALERT_METRICS, "step"))
        among("alerts: when", self.when, ("above", "below", *_ALERT_BOUNDS))
        if (self.metric == "step") != (self.when == "silent"):
            raise BadConfig(f"{where} silent is for the metric step, and nothing else is")
        within(
            f"{where} steps", self.steps, 2 if self.when == "constant" else 1, 1 if self.when == "silent" else 10_000
        )
        highest = ALERT_METRICS.get(self.metric, math.inf)
        if (self.when == "above" and not 0 <= self.value < highest) or (
            self.when == "below" and not 0 < self.value <= highest
        ):
            raise BadConfig(f"{where} value={self.value:g} never goes off, or always: the metric is 0 to {highest:g}")
        if self.when in _ALERT_BOUNDS:
            within(f"{where} value", self.value, *_ALERT_BOUNDS[self.when])


DEFAULT_ALERTS: Final = (
    AlertSettings(metric="loss", when="spike", value=6.0),
    AlertSettings(metric="loss", when="constant", steps=20),
    AlertSettings(metric="grad_norm", when="spike", value=10.0),
    AlertSettings(metric="tokens_per_second", when="drop", value=0.5, steps=10),
    AlertSettings(metric="memory_share", when="above", value=0.95),
    AlertSettings(metric="step", when="silent", value=600.0),
)
"""What is watched where nothing is said."""
