"""The held-out measure: mean loss of each row before and after, compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.trainer.data.samples import Sample
from services.trainer.loop import pack_of
from smeltkit.ml.decoder import Decoder

_Z95 = 1.959963985


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Held-out loss in nats a token, averaged over rows, and its change with a 95 % interval over paired rows."""

    before: float
    after: float
    change: float
    low: float
    high: float
    rows: int

    @property
    def is_better(self) -> bool:
        """Whether the loss fell by more than its uncertainty."""
        return self.high < 0


def row_losses(decoder: Decoder, samples: Sequence[Sample]) -> list[float]:
    """Mean loss over the learnt tokens of each sample."""
    device, found = decoder.embed.weight.device, []
    decoder.eval()
    for sample in samples:
        pack = pack_of([sample], device)
        with torch.no_grad():
            found.append(decoder.token_losses(pack.batch, pack.targets).sum().item() / pack.counted)
    return found


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """The comparison of the same rows under two models; normal interval of the mean of paired differences."""
    changes = np.asarray(after) - np.asarray(before)
    mean = float(changes.mean())
    half = _Z95 * float(changes.std(ddof=1)) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return Comparison(
        before=float(np.mean(before)),
        after=float(np.mean(after)),
        change=mean,
        low=mean - half,
        high=mean + half,
        rows=len(changes),
    )
