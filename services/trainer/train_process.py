"""One training, in a process of its own or in several: `python -m services.trainer.train_process FOLDER`.

    FOLDER/spec.json        what to do: settings, base and data by path, digest of the run
    FOLDER/checkpoints/     from which a later process goes on
    FOLDER/metrics.jsonl    one line a step, written before anybody is told
    FOLDER/heldout.jsonl    one line a held-out measurement
    FOLDER/bundle/          the trained weights with the base's other files
    FOLDER/outcome.json     last of all: what was reached, or the error by its reason; `launch` names those of others

Of several processes, as many as the settings say and torchrun or `node` has started, the one of rank 0 writes all files
but its part of the checkpoints. SIGTERM, to any of them, ends the training after the step under way, with a checkpoint.
Its memory and its crashes are not the service's; without whoever started it, it ends.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import merged_state
from services.trainer.adapters.peft_folder import save_adapter
from services.trainer.checkpoints import checkpoint
from services.trainer.costs.forecast import forecast
from services.trainer.costs.paces import Paces
from services.trainer.costs.peak import PeakMemory
from services.trainer.parallel import launch
from services.trainer.parallel.launch import error_of, outcome_file
from services.trainer.parallel.places import ALONE_HERE, Place, place
from services.trainer.parallel.ranks import ALONE, Ranks, joined
from services.trainer.parallel.sharding import shard
from services.trainer.plan import Prepared, prepare
from services.trainer.run.device import device_name, matrix_flops, prepare_device
from services.trainer.run.fresh import fresh_decoder
from services.trainer.run.heldout import HeldoutCourse
from services.trainer.run.loop import Run, StepReport
from services.trainer.settings.training import TrainSettings, parse_settings
from services.trainer.shape import CONFIG_FILE, shaped_config
from services.trainer.tracking.journal import Journal, open_journal
from smeltkit.errors import DiskFull, JobCancelled, OutOfMemory, SmeltError
from smeltkit.ml.bundle import Bundle, files_of
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import dequantization, quantize_linears
from smeltkit.ml.decoder_weights import DTYPES, load_decoder, save_weights
from smeltkit.ml.kernels import kernels_for
from smeltkit.ml.lineage import Lineage

_NOT_COPIED = ("contract.json", "lineage.json")


def main(folder: Path) -> int:
    """0 with an outcome, 1 with an error in its place."""
    spec, here = json.loads((folder / "spec.json").read_text()), place()
    return write_outcome(folder, lambda: train(folder, spec, here), here.rank)


def write_outcome(folder: Path, work: Callable[[], dict[str, Any]], rank: int = 0) -> int:
    """Leaves what `work` returns in the outcome file of `rank`, or the error that it raises; 1 for an error, else 0."""
    try:
        outcome = work()
    except SmeltError as error:
        outcome = error_of(error)
    except (MemoryError, torch.OutOfMemoryError):
        remedy = "lower pack_tokens or sequence_tokens, or set recompute or dtype bfloat16"
        outcome = error_of(OutOfMemory(f"the training ran out of memory; {remedy}"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        outcome = error_of(DiskFull(f"no space is left for the files of the training in {folder}; free some"))
    if rank == 0 or "reason" in outcome:
        launch.write_outcome(outcome_file(folder, rank), outcome)
    return int("reason" in outcome)


def train(folder: Path, spec: dict[str, Any], here: Place = ALONE_HERE) -> dict[str, Any]:
    """Trains as the spec says, as one of its processes; the outcome as plain values, of other ranks none."""
    settings = parse_settings(json.dumps(spec["settings"]))
    here.check(settings.processes)
    base = Path(spec["base"])
    bundle = Bundle.from_folder(base, lineage=Lineage.from_dict(spec["lineage"]), licence=spec["licence"])
    heldout = Path(spec["heldout"]) if spec["heldout"] else None
    prepared = prepare(base, bundle, [Path(path) for path in spec["data"]], heldout, settings)
    for refusal in prepared.refusals:
        raise refusal
    paces = Paces(Path(spec["paces"]), spec["threads"])
    if here.rank == 0:
        launch.tell_preparing(folder, "measures the pace of a step")
    pace = paces.of(prepared) if here.rank == 0 else None
    said = forecast(pace, prepared.tokens, settings.processes) if pace else None
    device = prepare_device(spec["threads"], here.local_rank, here.local_count, spec.get("gpu_bytes", 0))
    with joined(here, device) as met:
        ranks = replace(met, **asdict(settings.parallel))
        if ranks.is_first:
            launch.tell_preparing(folder, "loads the base, measures what is held out, tries the longest pack")
        rate = matrix_flops(device, getattr(torch, settings.dtype))
        torch.manual_seed(settings.seed)
        peak = PeakMemory(device)
        decoder = load_base(base, prepared, device)
        course = begin_course(folder, prepared, decoder, is_first=ranks.is_first)
        adapt(decoder, settings)
        shard(decoder, ranks, regathers=settings.regather)
        # Weights and adapters began alike in all processes; from here on each draws dropout and noise of its own, but
        # for those that see the same tokens. The first keeps the state that a training of one process would have.
        if ranks.leader:
            torch.manual_seed(settings.seed + ranks.leader)
        run = make_run(folder, spec["run_digest"], prepared, decoder, peak, ranks, course)
        with open_journal(folder, spec, prepared, run.step, rate) if ranks.is_first else nullcontext() as journal:
            why = run_to_end(run, prepared, ranks, journal, course)
    if journal is None:
        return {}
    paces.learn(prepared, run.cost)
    facts = {"device": device_name(device), "matrix_flops": rate, "forecast": said and asdict(said)}
    facts |= {**taken(run), "exports": journal.exported}
    step, tokens = run.step, run.cost.tokens
    if ranks.count > 1:
        del run, decoder
        decoder = _trained(folder, base, prepared, device)
    return {**facts, **conclude(folder, base, prepared, decoder, course, step=step, tokens=tokens, why=why)}


def begin_course(folder: Path, prepared: Prepared, decoder: Decoder, *, is_first: bool = True) -> HeldoutCourse | None:
    """The held-out measurements of a run in `folder`, unless nothing is held out; the first process measures the base,
    which it has whole."""
    if prepared.heldout is None:
        return None
    course = HeldoutCourse(folder, prepared.heldout.samples, writes=is_first)
    if is_first:
        course.measure(decoder, 0, 0)
    return course


def conclude(
    folder: Path, base: Path, prepared: Prepared, decoder: Decoder, course: HeldoutCourse | None, *,
    step: int, tokens: int, why: str,
) -> dict[str, Any]:  # fmt: skip
    """What a run reached after its last `step`, for its outcome: where it pauses that it does, else its bundle is
    written, of the weights of its best measurement where it keeps them. `why` is not empty if it stopped early."""
    told: dict[str, Any] = {}
    is_paused = not why and step < prepared.schedule.total_steps
    if course is not None:
        course.measure(decoder, step, tokens)
        best = None if is_paused else course.best(prepared.settings, step)
        told["heldout"] = asdict(course.comparison(best))
        if best is not None:
            told["best"] = {"step": best.step, "of": step}
            if best.step < step:
                _take_weights(decoder, checkpoint.of_step(folder / "checkpoints", best.step))
    if is_paused:
        kept = {step, course.kept_step(prepared.settings) or step} if course is not None else {step}
        return {**told, "paused": step, "checkpoints": [checkpoint.of_step(folder, one).name for one in sorted(kept)]}
    if why:
        told["stopped"] = {"step": step, "why": why}
    return {**told, **finish(folder, base, prepared, decoder)}


def adapt(decoder: Decoder, settings: TrainSettings) -> None:
    """Makes of a base what the method trains: quantized or not, with adapters or not."""
    if settings.method == "qlora":
        quantize_linears(decoder)
    if settings.is_adapted:
        attach(decoder, settings.adapter)


def run_to_end(
    run: Run, prepared: Prepared, ranks: Ranks, journal: Journal | None, course: HeldoutCourse | None
) -> str:
    """Trains to the end or to a pause, or as far as is worth it; in the last case why that is.

    JobCancelled after the step, and the checkpoint, in which any of the processes got SIGTERM.
    """
    settings = prepared.settings
    if course is not None and run.step < prepared.end_step and (why := course.why_stop(settings)):
        return why
    stops: list[int] = []
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))

    def tell(report: StepReport) -> bool:
        if os.getppid() != parent:
            raise SystemExit("whoever started this training is gone; another may be at work in its folder")
        measured = measured_after(run, report, course, settings, ranks)
        if journal is not None:
            journal.write(report, measured)
        if ranks.any(bool(stops)):
            run.save()
            raise JobCancelled(f"stopped after step {report.step}, which is saved")
        return bool(measured) and course is not None and bool(course.why_stop(settings))

    run.run(tell, prepared.end_step)
    return course.why_stop(settings) if course is not None and run.step < prepared.end_step else ""


def measured_after(
    run: Run, report: StepReport, course: HeldoutCourse | None, settings: TrainSettings, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """What is measured after a step, if anything; the run keeps the checkpoint of its best measurement."""
    if course is None:
        return {}
    found = course.after(run.decoder, report.step, report.tokens, settings, ranks)
    run.kept_step = course.kept_step(settings)
    return found


def taken(run: Run) -> dict[str, Any]:
    """What a run took, as part of an outcome."""
    several = {"codes": run.codes} if len(run.codes) > 1 else {}
    return {"cost": asdict(run.cost), "spikes": run.spikes, "packing": run.packing, **several}


def _trained(folder: Path, base: Path, prepared: Prepared, device: str) -> Decoder:
    """The model as the newest checkpoint has it, whole in this process."""
    decoder = load_base(base, prepared, device)
    adapt(decoder, prepared.settings)
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None, "a run ends with a checkpoint"
    _take_weights(decoder, newest)
    return decoder


@torch.no_grad()
def _take_weights(decoder: Decoder, found: Path) -> None:
    """Gives a decoder that is whole in this process the trained weights of a checkpoint."""
    _, tensors = checkpoint.read(found, "weights.")
    for name, value in decoder.named_parameters():
        if value.requires_grad:
            value.copy_(tensors[f"weights.{name}"])


def finish(folder: Path, base: Path, prepared: Prepared, decoder: Decoder) -> dict[str, Any]:
    """Writes the bundle of a run that is over; its stages and what its base was dequantized to, for its outcome."""
    _write_bundle(folder, base, prepared, decoder)
    exact = dequantization(decoder)
    told = {"stages": [stage.digests for stage in prepared.stages]}
    return {**told, "dequantization": exact} if exact else told


def load_base(base: Path, prepared: Prepared, device: str) -> Decoder:
    """The model to train, with the base's weights or new ones."""
    settings = prepared.settings
    options: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "device": device,
        "kernels": kernels_for(device),
        "sequence_tokens": settings.sequence_tokens,
    }
    if settings.init == "random":
        decoder = fresh_decoder(prepared.config, seed=settings.seed, **options)
    else:
        decoder = load_decoder(base, prepared.config, **options)
    decoder.recomputes = settings.recompute
    return decoder


def make_run(
    folder: Path, run_digest: str, prepared: Prepared, decoder: Decoder, peak: PeakMemory, ranks: Ranks = ALONE,
    course: HeldoutCourse | None = None,
) -> Run:  # fmt: skip
    """The run of a prepared training in `folder`, at its newest checkpoint; `course` is taken back to there."""
    run = Run(
        decoder,
        prepared.samples,
        prepared.order,
        prepared.schedule,
        prepared.settings,
        folder=folder / "checkpoints",
        run_digest=run_digest,
        peak=peak,
        heldout=prepared.heldout.samples if prepared.heldout else (),
        ranks=ranks,
    )
    if course is not None:
        course.keep_until(run.step)
        run.kept_step = course.kept_step(prepared.settings)
    return run


def _write_bundle(folder: Path, base: Path, prepared: Prepared, decoder: Decoder) -> None:
    """The base's files with the trained weights, in the base's type; an adapter is kept beside them too."""
    target = folder / "bundle"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in files_of(base):
        if path.name not in _NOT_COPIED and ".safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)
    if prepared.config != prepared.bundle.config:
        (target / CONFIG_FILE).write_text(json.dumps(shaped_config(base, prepared.settings.shape), indent=2))
    state = decoder.state_dict()
    if prepared.settings.is_adapted:
        adapter = folder / "adapter"
        adapter.mkdir(exist_ok=True)
        save_adapter(decoder, prepared.settings.adapter, adapter)
        state = merged_state(decoder)
    scheme = prepared.bundle.scheme if prepared.bundle.scheme in DTYPES else "BF16"
    save_weights(target, prepared.config, state, scheme)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
