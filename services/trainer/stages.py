"""The stages of a training: data, order and steps of each, why one cannot be, and what is told where one begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from services.trainer.data.dataset import Dataset
from services.trainer.data.order import Order, Share
from services.trainer.settings.stages import StageSettings
from services.trainer.settings.training import TrainSettings
from smeltkit.errors import BadSchedule


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with data of its own; of a run without stages, all of it."""

    where: str
    """What the names of its settings begin with."""
    settings: StageSettings
    data: tuple[Dataset, ...]
    """Its files."""
    order: Order
    reachable_steps: int
    """Steps that its epochs have."""

    @property
    def steps(self) -> int:
        """Steps that it shall have."""
        return self.settings.max_steps or self.reachable_steps

    @cached_property
    def tokens(self) -> int:
        """Tokens that go through the model in it."""
        return self.order.tokens_in(min(self.steps, self.reachable_steps))

    @property
    def digests(self) -> tuple[str, ...]:
        """Its data."""
        return tuple(one.digest for one in self.data)

    def refusals(self) -> list[BadSchedule]:
        """Why it cannot be as its settings say; empty if it can."""
        found, settings = [], self.settings
        if self.steps > self.reachable_steps:
            found.append(
                BadSchedule(
                    f"{self.where}max_steps={self.steps} is out of reach: {settings.epochs} epochs have"
                    f" {self.reachable_steps} steps; lower it, or raise epochs"
                )
            )
        if settings.min_tokens and self.tokens < settings.min_tokens:
            found.append(
                BadSchedule(
                    f"{self.where}min_tokens={settings.min_tokens} are asked for, but {self.tokens} tokens are seen;"
                    " lower it, or raise epochs"
                )
            )
        return found

    def to_text(self, first_step: int) -> str:
        """A line for people; `first_step` from 1."""
        named = zip(self.digests, self.settings.passes, strict=True)
        told = " + ".join(f"{digest[:19]}{f' x {passes:g}' if passes != 1 else ''}" for digest, passes in named)
        rows, samples = sum(one.rows for one in self.data), sum(len(one.samples) for one in self.data)
        return (
            f"{told}: {rows} rows, {samples} samples, {self.tokens:,} tokens in steps {first_step} to"
            f" {first_step + self.steps - 1}, of {self.reachable_steps} in {self.settings.epochs} epochs"
        )


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Where a stage follows upon another."""

    step: int
    """Its first step, from 1."""
    stage: int
    """Its number, from 1."""
    stages: int
    """How many there are."""
    before: tuple[str, ...]
    """Data of the stage before, by digest."""
    after: tuple[str, ...]
    """Data of this one."""
    heldout_loss: float | None
    """Mean of the held-out rows before its first step; None without any."""
    message: str
    """One line for people."""

    @classmethod
    def of(cls, stages: Sequence[Stage], number: int, step: int, heldout_loss: float | None) -> Transition:
        """That to stage `number`, from 1, whose first step is `step`."""
        before, after = (one.digests for one in stages[number - 2 : number])
        data = " -> ".join(" + ".join(digest[:19] for digest in digests) for digests in (before, after))
        measured = "" if heldout_loss is None else f", held-out loss {heldout_loss:.4f}"
        return cls(
            step=step,
            stage=number,
            stages=len(stages),
            before=before,
            after=after,
            heldout_loss=heldout_loss,
            message=f"stage {number} of {len(stages)} begins with step {step}: {data}{measured}",
        )


def make_stages(
    settings: TrainSettings, files: Sequence[tuple[Dataset, int]], lengths: Sequence[int]
) -> tuple[Stage, ...]:
    """The stages over `files`, each a data set and the number of its first sample among those of the run, of which
    `lengths` are told. BadSchedule where one takes nothing of a file."""
    left, epoch, found = iter(files), 0, []
    for number, stage in enumerate(settings.curriculum):
        where = f"stages[{number}]." if settings.stages else ""
        own = list(islice(left, len(stage.passes)))
        order = Order(
            lengths=lengths,
            pack_tokens=settings.pack_size_tokens,
            packs_per_step=settings.packs_per_step,
            seed=settings.seed,
            shares=_shares(stage, own, where),
            first_epoch=epoch,
        )
        epoch += stage.epochs
        found.append(
            Stage(
                where=where,
                settings=stage,
                data=tuple(data for data, _ in own),
                order=order,
                reachable_steps=order.steps_in(stage.epochs),
            )
        )
    return tuple(found)


def _shares(stage: StageSettings, files: Sequence[tuple[Dataset, int]], where: str) -> list[Share]:
    """What an epoch of a stage takes of each file."""
    found = []
    for number, ((data, first), passes) in enumerate(zip(files, stage.passes, strict=True)):
        share = Share(first=first, count=len(data.samples), passes=passes)
        if not len(share):
            raise BadSchedule(
                f"{where}mix[{number}]={passes:g} takes none of the {share.count} samples of {data.digest[:19]};"
                f" raise it to {1 / share.count:.2g}, or leave the file out"
            )
        found.append(share)
    return found
