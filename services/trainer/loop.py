"""A whole run: from the first step, or from the last checkpoint, to the last step. What was planned is what happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.trainer import checkpoint, watch
from services.trainer.data.order import Order
from services.trainer.data.samples import Sample
from services.trainer.forecast import Cost
from services.trainer.optimizer import Optimizer
from services.trainer.peak import PeakMemory
from services.trainer.schedule import Schedule
from services.trainer.settings import TrainSettings
from services.trainer.spikes import SpikeGuard
from services.trainer.step import Pack, StepResult, train_step
from smeltkit.errors import TrainingDiverged
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step tells the world."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Steps of the run."""
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    tokens: int
    """Tokens seen so far."""
    memory_bytes: int
    """Peak of the memory in use so far."""
    is_skipped: bool
    """Whether its update was dropped, because its loss was a spike."""
    sample_ids: tuple[int, ...]
    """Which samples the step held."""


class Run:
    """One training of `decoder`, whose trainable parameters are those that require a gradient."""

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        order: Order,
        schedule: Schedule,
        settings: TrainSettings,
        *,
        folder: Path,
        run_digest: str,
        peak: PeakMemory,
    ) -> None:
        """`folder` holds this run's checkpoints; it resumes from the newest. `run_digest` says which run it is."""
        self.decoder, self.schedule = decoder, schedule
        self._samples, self._order, self._settings = samples, order, settings
        self._folder, self._run_digest, self._peak = folder, run_digest, peak
        self._device = decoder.embed.weight.device
        self._optimizer = Optimizer(decoder.named_parameters(), settings.optimizer)
        self._guard = SpikeGuard(settings.spikes)
        self._losses: list[float] = []
        self._tokens, self._time_s = 0, 0.0
        self.step = 0
        """Steps done."""
        self._resume()

    def run(self, tell: Callable[[StepReport], None]) -> None:
        """Trains to the end; `tell` hears of every step and may raise to stop. Errors of `step` and `watch`."""
        self.decoder.train()
        if self.step == 0:
            self._try_longest()
        while self.step < self.schedule.total_steps:
            begin = time.monotonic()
            report = self._step()
            self._time_s += time.monotonic() - begin
            if self._guard.must_go_back:
                self._go_back()
            tell(report)
            if self.step % self._settings.checkpoint_steps == 0 or self.step == self.schedule.total_steps:
                self.save()
        self.decoder.eval()

    @property
    def spikes(self) -> dict[str, int]:
        """Steps clipped, updates dropped and rollbacks so far."""
        return self._guard.counts

    @property
    def cost(self) -> Cost:
        """What the run took so far, over all processes that worked at it; memory is this one's."""
        return Cost(time_s=self._time_s, memory_bytes=self._peak.bytes, tokens=self._tokens)

    def save(self) -> Path:
        """Writes a checkpoint of the present state."""
        progress = checkpoint.Progress(
            step=self.step,
            run_digest=self._run_digest,
            tokens=self._tokens,
            time_s=self._time_s,
            spikes=self._guard.state(),
            losses=tuple(self._losses),
        )
        return checkpoint.save(self._folder, progress, self._tensors(), keep=self._settings.keep_checkpoints)

    def _step(self) -> StepReport:
        numbers = self._order.at(self.step)
        packs = [pack_of([self._samples[number] for number in pack], self._device) for pack in numbers]
        rate = self.schedule.rate(self.step)
        frozen = watch.frozen_print(self.decoder) if self.step == 0 else {}
        begin = time.monotonic()
        result = train_step(
            self.decoder, self._optimizer, packs, learning_rate=rate, clip_norm=self._settings.clip_norm,
            bound=self._guard.bound,
        )  # fmt: skip
        took_s = time.monotonic() - begin
        if not result.is_skipped:
            watch.check_rate(self._optimizer, rate)
        if self.step < 2:
            watch.check_alive(self._optimizer, is_first=self.step == 0)
        watch.check_frozen(self.decoder, frozen)
        return self._count(result, rate, took_s, tuple(number for pack in numbers for number in pack))

    def _count(self, result: StepResult, rate: float, took_s: float, ids: tuple[int, ...]) -> StepReport:
        self.step += 1
        self._tokens += result.tokens
        self._losses = [*self._losses, result.loss][-self._settings.stuck_steps :]
        watch.check_moving(self._losses, self._settings.stuck_steps)
        return StepReport(
            step=self.step,
            steps=self.schedule.total_steps,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens_per_second=result.tokens / took_s,
            tokens=self._tokens,
            memory_bytes=self._peak.bytes,
            is_skipped=result.is_skipped,
            sample_ids=ids,
        )

    def _try_longest(self) -> None:
        """Takes the fullest pack through the model and back, so that memory runs out now or never."""
        longest = max((self._order.at(step) for step in range(self.schedule.total_steps)), key=self._largest_pack)
        fullest = max(longest, key=self._tokens_of)
        pack = pack_of([self._samples[number] for number in fullest], self._device)
        state = torch.get_rng_state()
        self.decoder.loss(pack.batch, pack.targets).backward()
        torch.set_rng_state(state)
        self.decoder.zero_grad(set_to_none=True)

    def _largest_pack(self, packs: Sequence[tuple[int, ...]]) -> int:
        return max(map(self._tokens_of, packs))

    def _tokens_of(self, pack: tuple[int, ...]) -> int:
        return sum(self._order.lengths[number] for number in pack)

    def _tensors(self) -> dict[str, Tensor]:
        weights = zip(self._optimizer.names, self._optimizer.parameters, strict=True)
        return {
            **{f"weights.{name}": value.detach() for name, value in weights},
            **{f"optimizer.{name}": value for name, value in self._optimizer.state().items()},
            checkpoint.RANDOM: torch.get_rng_state(),
        }

    def _resume(self) -> None:
        found = checkpoint.latest(self._folder)
        if found is None:
            return
        progress = self._restore(found)
        self.step, self._losses = progress.step, list(progress.losses)
        self._tokens, self._time_s = progress.tokens, progress.time_s
        self._guard.load_state(progress.spikes)

    def _go_back(self) -> None:
        """Takes the weights, optimizer and random state of the newest checkpoint; data and schedule go on from here."""
        found = checkpoint.latest(self._folder)
        if found is None:
            raise TrainingDiverged(
                f"the loss left its course before the first checkpoint, at step {self.step}; lower the learning rate,"
                " or write checkpoints more often"
            )
        self._guard.go_back()
        self._restore(found)
        self.save()

    @torch.no_grad()
    def _restore(self, found: Path) -> checkpoint.Progress:
        progress, tensors = checkpoint.read(found)
        checkpoint.check_same_run(progress, self._run_digest)
        for name, value in zip(self._optimizer.names, self._optimizer.parameters, strict=True):
            value.copy_(tensors[f"weights.{name}"])
        prefix = "optimizer."
        self._optimizer.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        torch.set_rng_state(tensors[checkpoint.RANDOM])
        return progress


def pack_of(samples: Sequence[Sample], device: torch.device | str) -> Pack:
    """Samples as one pack on a device."""
    targets = torch.cat([torch.from_numpy(sample.targets) for sample in samples]).to(torch.int64)
    return Pack(
        batch=Packed.of([sample.ids.tolist() for sample in samples], device),
        targets=targets.to(device, non_blocking=True),
        counted=sum(sample.counted for sample in samples),
    )
