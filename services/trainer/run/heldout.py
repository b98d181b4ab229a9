"""The held-out measure: mean loss of each row at the start of a run, now and then, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from services.trainer.data.samples import Sample
from services.trainer.parallel.context import own_part
from services.trainer.parallel.ranks import ALONE, Ranks
from services.trainer.run.early_stop import best_of, why_stop
from services.trainer.run.measured import HELDOUT_FILE, Measured, read_course, write_course
from services.trainer.run.packs import idle_pack, pack_of
from services.trainer.run.scaling import outlook
from services.trainer.settings.training import TrainSettings
from smeltkit.ml.decoder import Decoder
from smeltkit.paired import Comparison, compare


class HeldoutCourse:
    """The measurements of a run, each made once and kept in its folder: a run that goes on takes over what is there."""

    def __init__(self, folder: Path, samples: Sequence[Sample], *, writes: bool = True) -> None:
        """Begins with what is in `folder`; of several processes each has one, and the first `writes`."""
        self._path, self._samples, self._writes = folder / HELDOUT_FILE, samples, writes
        self.measured = read_course(self._path)
        """So far, in order."""

    def keep_until(self, step: int) -> None:
        """Drops what was measured after `step`, since those steps will be done again."""
        self.measured = [one for one in self.measured if one.step <= step]
        self._write()

    def measure(self, decoder: Decoder, step: int, tokens: int, ranks: Ranks = ALONE) -> Measured:
        """The measurement after `step`, of a decoder that is spread over `ranks` by all of them; draws no random number
        and leaves the decoder as it was."""
        known = next((one for one in self.measured if one.step == step), None)
        if known is None:
            is_training = decoder.training
            known = Measured(step=step, tokens=tokens, losses=tuple(row_losses(decoder, self._samples, ranks)))
            decoder.train(is_training)
            self.measured.append(known)
            self._write()
        return known

    def after(self, decoder: Decoder, step: int, tokens: int, settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
        """What a step's line tells of the held-out loss: nothing unless it is measured after this step."""
        every = (settings.heldout_steps, settings.early_stop.steps)
        if not any(steps and step % steps == 0 for steps in every):
            return {}
        found: dict[str, Any] = {"heldout": self.measure(decoder, step, tokens, ranks).loss}
        if expected := outlook(self.measured):
            found["outlook"] = expected.advice
        return found

    def why_stop(self, settings: TrainSettings) -> str:
        """Why the run ends early now; empty if it goes on."""
        return why_stop(self.measured, settings.early_stop)

    def best(self, settings: TrainSettings, last_step: int = 0) -> Measured | None:
        """What a run that keeps its best measurement would end in now, see `best_of`; None if it keeps none."""
        return best_of(self.measured, settings.early_stop, last_step)

    def kept_step(self, settings: TrainSettings) -> int:
        """Step of what the run would end in now, 0 for none."""
        best = self.best(settings)
        return best.step if best else 0

    def comparison(self, best: Measured | None = None) -> Comparison:
        """The newest measurement, or the `best`, beside the first."""
        return compare(self.measured[0].losses, (best or self.measured[-1]).losses)

    def _write(self) -> None:
        if self._writes:
            write_course(self._path, self.measured)


@torch.no_grad()
def row_losses(decoder: Decoder, samples: Sequence[Sample], ranks: Ranks = ALONE) -> list[float]:
    """Mean loss over the learnt tokens of each sample; of a decoder that is spread over `ranks`, each is told all.

    The decoder is left as it is when it is not trained.
    """
    device = decoder.embed.weight.device
    found = torch.zeros(len(samples), dtype=torch.float64, device=device)
    decoder.eval()
    for begin in range(0, len(samples), ranks.replicas):
        mine = ranks.share(range(begin, min(begin + ranks.replicas, len(samples))))
        pack = own_part(pack_of([samples[number] for number in mine], device) if mine else idle_pack(device), ranks)
        total = decoder.token_losses(pack.batch, pack.targets).sum().double()
        for number in mine:
            found[number] = total * ranks.is_teller / samples[number].counted
    losses: list[float] = ranks.summed(found).tolist()
    return losses
