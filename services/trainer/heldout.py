"""The held-out measure: mean loss of each row at the start of a run, now and then, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from services.trainer.data.samples import Sample
from services.trainer.loop import pack_of
from services.trainer.measured import HELDOUT_FILE, Measured, read_course, write_course
from smeltkit.ml.decoder import Decoder
from smeltkit.paired import Comparison, compare


class HeldoutCourse:
    """The measurements of a run, each made once and kept in its folder: a run that goes on takes over what is there."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        """Begins with what is in `folder`."""
        self._path, self._samples = folder / HELDOUT_FILE, samples
        self.measured = read_course(self._path)
        """So far, in order."""

    def keep_until(self, step: int) -> None:
        """Drops what was measured after `step`, since those steps will be done again."""
        self.measured = [one for one in self.measured if one.step <= step]
        write_course(self._path, self.measured)

    def measure(self, decoder: Decoder, step: int, tokens: int) -> Measured:
        """The measurement after `step`; draws no random number and leaves the decoder as it was."""
        known = next((one for one in self.measured if one.step == step), None)
        if known is None:
            is_training = decoder.training
            known = Measured(step=step, tokens=tokens, losses=tuple(row_losses(decoder, self._samples)))
            decoder.train(is_training)
            self.measured.append(known)
            write_course(self._path, self.measured)
        return known

    @property
    def comparison(self) -> Comparison:
        """The newest measurement beside the first."""
        return compare(self.measured[0].losses, self.measured[-1].losses)


def row_losses(decoder: Decoder, samples: Sequence[Sample]) -> list[float]:
    """Mean loss over the learnt tokens of each sample."""
    device, found = decoder.embed.weight.device, []
    decoder.eval()
    for sample in samples:
        pack = pack_of([sample], device)
        with torch.no_grad():
            found.append(decoder.token_losses(pack.batch, pack.targets).sum().item() / pack.counted)
    return found
