"""How large the noise on embeddings is."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.settings.ranges import within
from smeltkit.errors import UnsupportedOption


@dataclass(frozen=True, kw_only=True)
class NeftuneSettings:
    """Noise on the embeddings in training, see `neftune`; what is held out is measured without it."""

    alpha: float = 5.0
    """Bound of the noise, times the root of a sample's tokens by the hidden size; above 0 to 1000."""

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise UnsupportedOption("neftune.alpha=0 adds no noise; raise it, 5 to 15 are usual, or remove neftune")
        within("neftune.alpha", self.alpha, 1e-6, 1000)
