"""A whole run: from the first step, or from the last checkpoint, to the last step. What was planned is what happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from services.trainer.adapters.adalora import Allocation
from services.trainer.checkpoints import checkpoint
from services.trainer.checkpoints.random_state import NAMES as GENERATORS
from services.trainer.checkpoints.random_state import random_state, set_random_state
from services.trainer.costs.forecast import Cost
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.samples import Sample
from services.trainer.optim.optimizer import Optimizer
from services.trainer.optim.schedule import Schedule
from services.trainer.parallel.context import own_part
from services.trainer.parallel.ranks import ALONE, Ranks
from services.trainer.parallel.sharding import held, is_spread, spread_as
from services.trainer.run import watch
from services.trainer.run.heldout import row_losses
from services.trainer.run.neftune import noise_of
from services.trainer.run.packs import idle_pack, pack_of
from services.trainer.run.spikes import SpikeGuard
from services.trainer.run.step import StepResult, train_step
from services.trainer.settings.training import TrainSettings
from smeltkit.errors import TrainingDiverged
from smeltkit.ml.decoder import Decoder
from smeltkit.revision import code_revision

_ALLOCATION: Final = "allocation."
"""What the names of how ranks are shared out begin with among the tensors of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step tells the world."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Steps of the run."""
    stage: int
    """Stage that it belongs to, from 1."""
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
    counted: int
    """Learnt tokens of the step; with the next two what `noise` is told from."""
    first_counted: int
    first_grad_norm: float | None
    sample_ids: tuple[int, ...]
    """Which samples the step held."""
    heldout_loss: float | None = None
    """Mean of the held-out rows before the step, where it is the first of a stage after another."""


class Run:
    """One training of `decoder`, whose trainable parameters are those that require a gradient."""

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        order: Curriculum,
        schedule: Schedule,
        settings: TrainSettings,
        *,
        folder: Path,
        run_digest: str,
        peak: PeakMemory,
        heldout: Sequence[Sample] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        """`folder` holds this run's checkpoints; it resumes from the newest. `run_digest` says which run it is.

        Where a stage follows upon another, the loss of `heldout` is measured. Of several `ranks` each makes this run
        with the same arguments, over its part of the decoder.
        """
        self.decoder, self.schedule = decoder, schedule
        self._samples, self._order, self._settings, self._heldout = samples, order, settings, heldout
        self._folder, self._run_digest, self._peak, self._ranks = folder, run_digest, peak, ranks
        self._checkpoints = checkpoint.Checkpoints(folder, keep=settings.keep_checkpoints, ranks=ranks)
        self._device = decoder.embed.weight.device
        self._optimizer = Optimizer(decoder.named_parameters(), settings.optimizer)
        self._guard = SpikeGuard(settings.spikes)
        self._noise = noise_of(settings.neftune.alpha) if settings.neftune else None
        adalora, total_steps = settings.lora.adalora, schedule.total_steps
        self._allocation = Allocation(decoder, adalora, settings.lora.rank, total_steps) if adalora else None
        self._losses: list[float] = []
        self._tokens, self._time_s = 0, 0.0
        self.step = 0
        """Steps done."""
        self.codes: tuple[tuple[str, int], ...] = ((code_revision(), 0),)
        """See `Progress.codes`."""
        self.kept_step = 0
        """Step whose checkpoint is written and stays, whatever comes after it; 0 for none."""
        self._resume()

    def run(self, tell: Callable[[StepReport], bool | None], end_step: int = 0) -> None:
        """Trains to the end, or until `end_step` is saved; `tell` hears of every step, and returns true where the run
        is to end with that one, saved, or raises to stop.

        Errors of `step` and `watch`.
        """
        try:
            for report in self.steps(end_step):
                if tell(report):
                    self.save()
                    break
        finally:
            self.wait_for_saving()

    def steps(self, end_step: int = 0) -> Iterator[StepReport]:
        """Trains as it is asked for the next step; what is due after a step is done when the next is asked for."""
        end_step = end_step or self.schedule.total_steps
        self.decoder.train()
        if self.step == 0:
            self._try_longest()
        while self.step < end_step:
            heldout_loss = self._measured() if self._order.enters(self.step) else None
            begin = time.monotonic()
            report = self._step()
            self._time_s += time.monotonic() - begin
            if self._guard.must_go_back:
                self._go_back()
            yield replace(report, heldout_loss=heldout_loss)
            if self.step % self._settings.checkpoint_steps == 0 or self.step in (end_step, self.kept_step):
                self.start_saving()
        self.wait_for_saving()
        self.decoder.eval()

    @property
    def spikes(self) -> dict[str, int]:
        """Steps clipped, updates dropped and rollbacks so far."""
        return self._guard.counts

    @property
    def packing(self) -> tuple[float, ...]:
        """Share of the packs of each stage that holds tokens."""
        return self._order.efficiency

    @property
    def cost(self) -> Cost:
        """What the run took so far, over all processes that worked at it; memory is this one's."""
        return Cost(time_s=self._time_s, memory_bytes=self._peak.bytes, tokens=self._tokens)

    def save(self) -> None:
        """Writes a checkpoint of the present state and returns once it is there, whole, whoever holds its parts."""
        self.start_saving()
        self.wait_for_saving()

    def start_saving(self) -> None:
        """Begins to write a checkpoint of the present state, see `Checkpoints.start`; the next step may change it."""
        progress = checkpoint.Progress(
            step=self.step,
            run_digest=self._run_digest,
            codes=self.codes,
            tokens=self._tokens,
            time_s=self._time_s,
            spikes=self._guard.state(),
            losses=tuple(self._losses),
        )
        self._checkpoints.start(progress, self._tensors(), kept_step=self.kept_step)

    def wait_for_saving(self) -> None:
        """Returns once the checkpoint under way is there; its error if it could not be written."""
        self._checkpoints.wait()

    def _step(self) -> StepReport:
        numbers = self._order.at(self.step)
        mine = self._ranks.share(numbers)
        packs = [pack_of([self._samples[number] for number in pack], self._device) for pack in mine]
        packs += [idle_pack(self._device)] * (-(-len(numbers) // self._ranks.replicas) - len(mine))
        packs = [own_part(pack, self._ranks) for pack in packs]
        rate = self.schedule.rate(self.step)
        frozen = watch.frozen_print(self.decoder) if self.step == 0 else {}
        self.decoder.noise = self._noise  # adapters that take turns on a decoder each have their own
        begin = time.monotonic()
        result = train_step(
            self.decoder, self._optimizer, packs, learning_rate=rate, clip_norm=self._settings.clip_norm,
            bound=self._guard.bound, ranks=self._ranks, allocation=self._allocation,
        )  # fmt: skip
        if self._allocation is not None:
            self._allocation.share_out(self.step + 1)
        took_s = time.monotonic() - begin
        if not result.is_skipped:
            watch.check_rate(self._optimizer, rate)
        if self.step < 2:
            watch.check_alive(self._optimizer, is_first=self.step == 0, ranks=self._ranks)
        watch.check_frozen(self.decoder, frozen)
        return self._count(result, rate, took_s, tuple(number for pack in numbers for number in pack))

    def _count(self, result: StepResult, rate: float, took_s: float, ids: tuple[int, ...]) -> StepReport:
        stage = self._order.stage(self.step) + 1
        self.step += 1
        self._tokens += result.tokens
        self._losses = [*self._losses, result.loss][-self._settings.stuck_steps :]
        watch.check_moving(self._losses, self._settings.stuck_steps)
        return StepReport(
            step=self.step,
            steps=self.schedule.total_steps,
            stage=stage,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens_per_second=result.tokens / took_s,
            tokens=self._tokens,
            memory_bytes=self._peak.bytes,
            is_skipped=result.is_skipped,
            counted=result.counted,
            first_counted=result.first_counted,
            first_grad_norm=result.first_grad_norm,
            sample_ids=ids,
        )

    def _measured(self) -> float | None:
        """Mean loss of the held-out rows, if there are any."""
        losses = row_losses(self.decoder, self._heldout, self._ranks)
        self.decoder.train()
        return sum(losses) / len(losses) if losses else None

    def _try_longest(self) -> None:
        """Takes the fullest pack through the model and back, so that memory runs out now or never."""
        samples = [self._samples[number] for number in self._order.fullest()]
        pack = own_part(pack_of(samples, self._device), self._ranks)
        state = random_state()
        self.decoder.loss(pack.batch, pack.targets).backward()
        set_random_state(state)
        self.decoder.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _tensors(self) -> dict[str, Tensor]:
        """The state, of what is spread this process's part; random states are its own."""
        spread = dict(zip(self._optimizer.names, self._optimizer.parameters, strict=True))
        state = self._optimizer.state()
        return {
            **{f"weights.{name}": value.detach() for name, value in spread.items()},
            **{f"optimizer.{key}": spread_as(value, spread[key.rpartition(".")[0]]) for key, value in state.items()},
            **{_random_name(name, self._ranks.rank): value for name, value in random_state().items()},
            **{f"{_ALLOCATION}{name}": value for name, value in self._allocated().items()},
        }

    def _resume(self) -> None:
        found = checkpoint.latest(self._folder)
        if found is None:
            return
        progress = self._restore(found)
        self.step, self._losses = progress.step, list(progress.losses)
        self._tokens, self._time_s = progress.tokens, progress.time_s
        self._guard.load_state(progress.spikes)
        is_same = progress.codes[-1][0] == code_revision()
        self.codes = progress.codes if is_same else (*progress.codes, (code_revision(), self.step))

    def _go_back(self) -> None:
        """Takes the weights, optimizer and random state of the newest checkpoint; data and schedule go on from here."""
        self.wait_for_saving()
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
        stored = checkpoint.Stored(found)
        checkpoint.check_same_run(stored.progress, self._run_digest)
        spread = dict(zip(self._optimizer.names, self._optimizer.parameters, strict=True))
        weights = {f"weights.{name}": value.detach() for name, value in spread.items()}
        prefix = "optimizer."
        state = {name: self._empty(spread, name.removeprefix(prefix), *form)
                 for name, form in stored.forms.items() if name.startswith(prefix)}  # fmt: skip
        mine = {_random_name(name, self._ranks.leader): name for name in GENERATORS}
        random = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in stored.forms.items() if name in mine}
        allocated = {f"{_ALLOCATION}{name}": value.clone() for name, value in self._allocated().items()}
        stored.load(weights | state | random | allocated)
        if self._allocation is not None:
            self._allocation.load_state({name.removeprefix(_ALLOCATION): value for name, value in allocated.items()})
        self._optimizer.load_state({name.removeprefix(prefix): held(value) for name, value in state.items()})
        set_random_state({mine[name]: value for name, value in random.items()})
        return stored.progress

    def _allocated(self) -> dict[str, Tensor]:
        """State of how ranks are shared out, if they are."""
        return self._allocation.state() if self._allocation is not None else {}

    def _empty(self, spread: Mapping[str, Tensor], key: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the optimizer's `key`, which is about one of the parameters, is to be read into."""
        like = spread.get(key.rpartition(".")[0])
        if like is None or not is_spread(like) or not size:
            return torch.empty(tuple(size), dtype=dtype)
        return spread_as(torch.empty_like(held(like), dtype=dtype), like)


def _random_name(name: str, rank: int) -> str:
    """Name of the state of a process's generator among the tensors of a checkpoint."""
    return f"{checkpoint.RANDOM}{name}.{rank}" if rank else f"{checkpoint.RANDOM}{name}"
