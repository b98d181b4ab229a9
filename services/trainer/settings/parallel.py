"""How the processes of a training share its work."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.settings.ranges import within
from smeltkit import limits


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the processes of a training share its work: `tensor` of them each layer, `context` such groups the tokens of
    a pack, and what is left of their number the packs of a step."""

    tensor: int = 1
    """Processes that compute each layer together, each with its heads, its part of the MLP and of the vocabulary."""
    context: int = 1
    """Processes, or groups of `tensor` processes, that share the tokens of each pack."""

    def __post_init__(self) -> None:
        within("parallel.tensor", self.tensor, 1, limits.TRAIN_PROCESSES_MAX)
        within("parallel.context", self.context, 1, limits.TRAIN_PROCESSES_MAX)
