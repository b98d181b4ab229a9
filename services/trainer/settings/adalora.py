"""How many ranks each layer's adapter keeps, where they are shared out by importance."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.optim.schedule import Schedule
from services.trainer.settings.ranges import within
from smeltkit.errors import BadConfig, BadSchedule, UnsupportedOption


@dataclass(frozen=True, kw_only=True)
class AdaloraSettings:
    """Adapters whose ranks are shared out among layers, see `adapters.adalora`; each keeps `lora.rank` on average."""

    initial_rank: int = 12
    """Ranks that each layer begins with, above `lora.rank`, to 1024."""
    warmup_steps: int = 0
    """Steps before the first ranks are taken away."""
    final_steps: int = 0
    """Steps at the end in which each layer keeps what it has then."""
    every_steps: int = 1
    """Steps between two times that ranks are shared out."""
    beta1: float = 0.85
    """Decay of the mean sensitivity, above 0 to below 1."""
    beta2: float = 0.85
    """Decay of the mean uncertainty about it, above 0 to below 1."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps P and Q orthogonal, above 0 to 100."""

    def __post_init__(self) -> None:
        within("lora.adalora.warmup_steps", self.warmup_steps, 0, 10**9)
        within("lora.adalora.final_steps", self.final_steps, 0, 10**9)
        within("lora.adalora.every_steps", self.every_steps, 1, 10**9)
        for name in ("beta1", "beta2"):
            within(f"lora.adalora.{name}", getattr(self, name), 1e-6, 1 - 1e-6)
        within("lora.adalora.orthogonality", self.orthogonality, 1e-6, 100.0)

    def check(self, rank: int, *, is_plain: bool) -> None:
        """BadConfig or UnsupportedOption unless it goes with a `lora.rank`, and with adapters that are nothing else."""
        if not rank < self.initial_rank <= 1024:
            raise BadConfig(
                f"lora.adalora.initial_rank={self.initial_rank} must be above lora.rank={rank}, what is kept of it on"
                " average, and 1024 at most"
            )
        if not is_plain:
            raise UnsupportedOption("lora.adalora goes neither with dora nor with rank_stabilized; remove one of them")

    def check_processes(self, processes: int, *, is_elsewhere: bool) -> None:
        """UnsupportedOption where one process does not hold all that ranks are shared out by."""
        if processes > 1:
            raise UnsupportedOption(
                f"lora.adalora ranks all layers by gradients that processes={processes} hold in parts; set processes to"
                " 1, or remove lora.adalora"
            )
        if is_elsewhere:
            raise UnsupportedOption("lora.adalora needs gradients where the weights are; remove optimizer.offload")

    def refusals(self, schedule: Schedule) -> list[BadSchedule]:
        """Why ranks cannot be shared out in the steps of a run."""
        left = schedule.total_steps - self.final_steps - self.warmup_steps
        if left > 0 or not schedule.total_steps:
            return []
        return [
            BadSchedule(
                f"lora.adalora: warmup_steps={self.warmup_steps} and final_steps={self.final_steps} leave none of the"
                f" run's {schedule.total_steps} steps to share out ranks in; lower them"
            )
        ]
