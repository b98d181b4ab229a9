"""How long a training, or each of the stages of one, goes on with its data."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.trainer.settings.ranges import within
from services.trainer.settings.reader import WRITTEN
from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How long a training, or a stage of it, goes on with its data."""

    epochs: int = 1
    """Passes over the data, 1 to 1000."""
    max_steps: int = 0
    """Optimizer steps after which it ends; 0 for all that the epochs have."""
    min_tokens: int = 0
    """Tokens that it must see at least."""
    mix: tuple[float, ...] = field(default=(), metadata={WRITTEN: "data"})
    """How often an epoch passes over each of several data files, above 0 to 1000: 0.5 takes a half that is drawn anew
    each time. Empty for one file, once."""

    def check(self, where: str = "") -> None:
        """BadConfig for a value out of its range, naming it as a key of `where`."""
        for name, low, high in (("epochs", 1, 1000), ("max_steps", 0, 10**9), ("min_tokens", 0, 10**15)):
            within(where + name, getattr(self, name), low, high)
        if len(self.mix) > limits.TRAIN_FILES_MAX:
            raise BadConfig(f"{where}mix has {len(self.mix)} data files; {limits.TRAIN_FILES_MAX} at most can be mixed")
        for number, passes in enumerate(self.mix):
            within(f"{where}mix[{number}]", passes, limits.TRAIN_PASSES_MIN, limits.TRAIN_PASSES_MAX)

    @property
    def passes(self) -> tuple[float, ...]:
        """How often an epoch passes over each of its files."""
        return self.mix or (1.0,)
