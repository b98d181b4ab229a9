"""What a training would do, cost and show, and why it would be refused; found from the data itself, without torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from services.trainer.adapters.targets import unknown_targets
from services.trainer.costs.forecast import Pace, forecast
from services.trainer.costs.memory import checkpoint_bytes, components, host_components, trainable_parameters
from services.trainer.data.curriculum import Curriculum, Joined
from services.trainer.data.dataset import Dataset, open_dataset, read_dataset
from services.trainer.data.recipe import Recipe
from services.trainer.data.samples import Encoder
from services.trainer.data.stored import is_sealed
from services.trainer.optim.schedule import Schedule
from services.trainer.parallel import devices, splits
from services.trainer.settings.training import TrainSettings
from services.trainer.shape import shaped
from services.trainer.stages import Stage, make_stages
from services.trainer.tracking.alerts import never_fires
from smeltkit.errors import BadConfig, BadDataset, BadSchedule, SettingsDiffer, SmeltError, UnsupportedOption
from smeltkit.jobs.plan import Plan
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle
from smeltkit.revision import code_revision

PREVIEW_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data, order and schedule of a training: what both the plan and the run are made from."""

    bundle: Bundle
    config: ModelConfig
    """Dimensions of the model that is trained: the base's, unless its weights begin at random."""
    settings: TrainSettings
    data: tuple[Dataset, ...]
    """Each of the data files once."""
    samples: Joined
    """Those of all data files, as they are numbered in `order`."""
    heldout: Dataset | None
    stages: tuple[Stage, ...]
    order: Curriculum
    schedule: Schedule
    previews: tuple[str, ...]
    """The first sample of each data file, with what is learnt between double angle brackets."""
    refusals: tuple[SmeltError, ...]

    @property
    def end_step(self) -> int:
        """Step after which the run pauses or is over."""
        return self.settings.until_step or self.schedule.total_steps

    @property
    def tokens(self) -> int:
        """Tokens that go through the model until then."""
        return self.order.tokens_in(self.end_step)

    @property
    def step_tokens(self) -> float:
        """Learnt tokens of a step, on average and about: the share of them is that of all files."""
        share = sum(one.counted for one in self.data) / sum(one.tokens for one in self.data)
        return share * self.tokens / self.end_step


def prepare(
    folder: Path, bundle: Bundle, data: Sequence[Path], heldout: Path | None, settings: TrainSettings
) -> Prepared:
    """Reads the data for a bundle's folder, rows or what they were tokenized to; BadDataset for a wrong row.

    `data` are the files of all stages, some perhaps more than once. Why it cannot run is in `refusals`.
    """
    recipe = Recipe.of(bundle.contract, settings)
    encoder = recipe.encoder(folder)
    config = shaped(folder, bundle.config, settings.shape)
    read = {path: _read(path, encoder, recipe) for path in data}
    found = tuple(read.values())
    samples = Joined([one.samples for one in found])
    firsts = dict(zip(read, samples.firsts, strict=False))
    lengths = array("i", chain.from_iterable(one.samples.lengths for one in found))
    stages = make_stages(settings, [(read[path], firsts[path]) for path in data], lengths)
    order = Curriculum([(stage.order, stage.steps) for stage in stages])
    schedule = Schedule(
        kind=settings.schedule,
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        total_steps=order.starts[-1],
        final_share=settings.final_share,
    )
    held = _read(heldout, encoder, Recipe.of(bundle.contract, settings, is_heldout=True)) if heldout else None
    return Prepared(
        bundle=bundle,
        config=config,
        settings=settings,
        data=found,
        samples=samples,
        heldout=held,
        stages=stages,
        order=order,
        schedule=schedule,
        previews=tuple(encoder.preview(one.samples[0])[:PREVIEW_CHARS] for one in found),
        refusals=(
            *chain.from_iterable(stage.refusals() for stage in stages),
            *schedule.refusals(horizon_steps=settings.horizon_steps),
            *(settings.lora.adalora.refusals(schedule) if settings.lora.adalora else ()),
            *_on_the_way(settings, schedule, held),
            *never_fires(settings.alerts, schedule),
            *_misfits(bundle, settings),
            *splits.refusals(config, settings),
        ),
    )


def plan_of(prepared: Prepared, base_bytes: int, pace: Pace | None = None) -> Plan:
    """The plan of a prepared training from a base of that many stored bytes; without a pace its time is unknown."""
    settings, config = prepared.settings, prepared.config
    needs, trained = components(config, settings), trainable_parameters(config, settings)
    saved_bytes = checkpoint_bytes(config, settings)
    schedule = prepared.schedule
    middle = schedule.total_steps // 2
    rates = [schedule.rate(step) for step in (0, middle, schedule.total_steps - 1)] if schedule.total_steps else []
    said = forecast(pace, prepared.tokens, settings.processes) if pace else None
    items = {
        "method": settings.method,
        "code": code_revision(),
        "trainable": f"{trained:,} of {config.parameters:,} parameters",
        **_of_data(prepared),
        "held out": "none" if prepared.heldout is None else f"{len(prepared.heldout.samples)} samples",
        **_of_measuring(prepared),
        **_of_stages(prepared),
        **_of_pretraining(prepared),
        **_of_processes(settings),
        **_of_load(pace),
        "packing": ", ".join(f"{stage.order.efficiency:.1%}" for stage in prepared.stages)
        + f" of {settings.pack_size_tokens} tokens a pack",
        "learning rate": " -> ".join(f"{rate:.2e}" for rate in rates),
        "checkpoints": f"every {settings.checkpoint_steps} steps, {saved_bytes / 2**20:.1f} MiB each",
        **_of_host(config, settings),
        **{f"memory, {name}": f"{size / 2**20:.1f} MiB" for name, size in needs.items() if size},
        **_numbered("first sample", prepared.previews),
    }
    return Plan(
        read_bytes=base_bytes,
        write_bytes=base_bytes + saved_bytes * (settings.keep_checkpoints + 1 + bool(settings.early_stop.steps)),
        memory_bytes=said.memory_bytes if said and settings.processes == 1 else sum(needs.values()),
        time_s=said.time_s if said else 0.0,
        steps=(
            "fetch base and data",
            "tokenize",
            *_first_steps(prepared),
            "train",
            *_last_steps(prepared),
            "store bundle",
            "probe",
            "name",
        ),
        items=items,
        counts={} if prepared.refusals else {"steps": prepared.end_step, "tokens": prepared.tokens},
        refusals=prepared.refusals,
    )


def _of_data(prepared: Prepared) -> dict[str, str]:
    """What the data files hold, and what becomes of their rows."""
    settings, files = prepared.settings, prepared.data
    held = [f"{one.rows} rows, {one.tokens:,} tokens, {one.counted:,} of them learnt" for one in files]
    moved = sum(one.rearranged for one in files)
    return {
        **_numbered("data", [f"{one.digest[:19]}: {text}" for one, text in zip(files, held, strict=True)]),
        **({"rearranged": f"{moved} rows, to fill in the middle"} if settings.fim.share else {}),
        "left out": f"{sum(len(one.too_long) for one in files)} rows longer than {settings.sequence_tokens} tokens",
    }


def _of_stages(prepared: Prepared) -> dict[str, str]:
    """How far the run goes, and what of it are its stages, if it has any, or its mix."""
    stages, settings = prepared.stages, prepared.settings
    reachable, epochs = sum(one.reachable_steps for one in stages), sum(one.settings.epochs for one in stages)
    told = [one.to_text(begin + 1) for one, begin in zip(stages, prepared.order.starts, strict=False)]
    is_plain = not settings.stages and not settings.mix
    return {
        "steps": f"{prepared.schedule.total_steps} of {reachable} in {epochs} epochs",
        **({} if is_plain else {f"stage {number}": text for number, text in enumerate(told, start=1)}),
    }


def _numbered(name: str, values: Sequence[str]) -> dict[str, str]:
    """Items of a plan that there are one of or several."""
    return {name if len(values) == 1 else f"{name} {number}": value for number, value in enumerate(values, start=1)}


def _of_measuring(prepared: Prepared) -> dict[str, str]:
    """How often held-out rows are measured on the way, and what that is beside the tokens of the run."""
    settings, heldout = prepared.settings, prepared.heldout
    every = [steps for steps in (settings.heldout_steps, settings.early_stop.steps) if steps]
    if not every or heldout is None or prepared.refusals:
        return {}
    times = len({step for steps in every for step in range(steps, prepared.end_step, steps)})
    tokens = times * heldout.tokens
    stop = settings.early_stop
    early = f"; may stop after step {stop.first_step} or later, ends in its best weights" if stop.steps else ""
    return {"held out, on the way": f"{times} times, {tokens:,} tokens beside {prepared.tokens:,} of training{early}"}


def _of_pretraining(prepared: Prepared) -> dict[str, str]:
    """Where the weights begin, and how many tokens the run has for each of them; a compute-optimal run has about 20.

    Hoffmann et al., "Training Compute-Optimal Large Language Models" (arXiv:2203.15556), table 3.
    """
    if prepared.settings.method != "pretrain" or prepared.refusals:
        return {}
    share = prepared.tokens / prepared.config.parameters
    return {"weights begin": prepared.settings.init, "tokens a parameter": f"{share:.2f}, compute-optimal is about 20"}


def _of_processes(settings: TrainSettings) -> dict[str, str]:
    """What the figures of a plan mean where several processes share the training."""
    if settings.processes == 1:
        return {}
    told = "memory is that of each, time leaves out what they tell each other"
    if settings.replicas == settings.processes:
        return {"processes": f"{settings.processes}; {told}"}
    tensor, context = settings.parallel.tensor, settings.parallel.context
    arranged = f"{settings.replicas} for packs x {context} for the tokens of each x {tensor} for layers"
    return {"processes": f"{settings.processes}, {arranged}; {told}"}


def _of_host(config: ModelConfig, settings: TrainSettings) -> dict[str, str]:
    """What the copy of a checkpoint that is being written takes of the host's memory, and an offloaded optimizer."""
    needs = host_components(config, settings)
    return {f"memory of the host, {name}": f"{size / 2**20:.1f} MiB" for name, size in needs.items() if size}


def _of_load(pace: Pace | None) -> dict[str, str]:
    """What to think of a time that was measured beside other work."""
    if pace is None or pace.is_quiet:
        return {}
    share = f"a step had the processor for {pace.processor_share:.0%} of its time"
    return {"time measured": f"on a busy machine, {share}: it takes less on a quiet one"}


def _first_steps(prepared: Prepared) -> tuple[str, ...]:
    return ("draw weights",) if prepared.settings.init == "random" else ()


def _last_steps(prepared: Prepared) -> tuple[str, ...]:
    merge = ("merge adapters",) if prepared.settings.is_adapted else ()
    return (*merge, *(("compare held-out loss",) if prepared.heldout else ()))


def _misfits(bundle: Bundle, settings: TrainSettings) -> list[SmeltError]:
    """Why these settings do not fit this base."""
    found: list[SmeltError] = []
    if settings.code not in ("", code_revision()):
        found.append(SettingsDiffer(
            f"code={settings.code!r} is asked for and this trainer is {code_revision()}; let a trainer of that revision"
            " do it, or remove code to take this one"
        ))  # fmt: skip
    if bundle.format != "safetensors":
        found.append(
            UnsupportedOption(f"the base is stored as {bundle.scheme} in GGUF; train its safetensors source instead")
        )
    if settings.sequence_tokens > bundle.config.context_tokens:
        context = bundle.config.context_tokens
        found.append(BadConfig(f"sequence_tokens={settings.sequence_tokens} exceeds the base's context of {context}"))
    found += devices.refusals(settings.processes, settings.nodes)
    if settings.optimizer.offload and devices.devices_here()[1] != "GPUs":
        found.append(UnsupportedOption("optimizer.offload has no effect without a GPU; remove it"))
    return [*found, *(unknown_targets(bundle.config, settings.adapter) if settings.is_adapted else ())]


def _on_the_way(settings: TrainSettings, schedule: Schedule, heldout: Dataset | None) -> list[SmeltError]:
    """Why the run cannot pause, be measured or stop where it should."""
    first = {
        "until_step": settings.until_step,
        "heldout_steps": settings.heldout_steps,
        "early_stop: steps * (window + patience)": settings.early_stop.first_step if settings.early_stop.steps else 0,
    }
    found: list[SmeltError] = [
        BadSchedule(f"{name}={step} must be below the run's {schedule.total_steps} steps; lower it, or remove it")
        for name, step in first.items()
        if step >= max(schedule.total_steps, 1)
    ]
    if heldout is not None and len(heldout.samples) < 2:
        found.append(
            BadDataset("the held-out data make one sample, which gives no interval; give two or more, or none")
        )
    if settings.measures_on_the_way and heldout is None:
        found.append(
            UnsupportedOption("heldout_steps and early_stop have no effect without heldout; name held-out data")
        )
    if settings.early_stop.steps and settings.stages:
        found.append(
            UnsupportedOption("early_stop would end the run before its later stages; remove it, or the stages")
        )
    return found


def _read(path: Path, encoder: Encoder, recipe: Recipe) -> Dataset:
    if is_sealed(path):
        return open_dataset(path)
    infill = recipe.infill(encoder)
    return read_dataset(
        path,
        encoder,
        recipe.sequence_tokens,
        text_only=recipe.text_only,
        form=recipe.form,
        columns=recipe.columns,
        infill=infill,
    )
