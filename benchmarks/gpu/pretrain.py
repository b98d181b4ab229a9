"""Pre-training a small model by the trainer's own run against a loop written out in plain torch, over the same steps.

    python -m benchmarks.gpu.pretrain BASE DATA [--steps N] [--keep FOLDER]

BASE is a bundle's folder: its shape and tokenizer are taken, the weights begin at random. Both sides get the same
weights, rows, order and rates. The plain loop does as such loops do: float32 weights under bf16 autocast, rows padded
to the longest of their step, whole logits, torch's fused AdamW. Speed counts tokens of rows, never padding, from the
50th step on and with everything between two steps. A third run differs from ours by nothing but its seed: how far its
losses are from ours is the noise that the difference to the plain loop is held against. With two GPUs the plain loop
has one of them for itself, else one contender follows the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import results
from services.trainer.data.samples import Sample
from services.trainer.device import prepare_device
from services.trainer.fresh import fresh_decoder
from services.trainer.peak import PeakMemory
from services.trainer.plan import Prepared, prepare
from services.trainer.settings import parse_settings
from services.trainer.train_process import finish, load_base, make_run
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.lineage import Lineage

SETTINGS: Final[dict[str, Any]] = {
    "method": "pretrain", "init": "random", "dtype": "bfloat16", "epochs": 1000, "sequence_tokens": "2K",
    "pack_tokens": "64K", "packs_per_step": 1, "learning_rate": "1e-3", "warmup_steps": 100, "checkpoint_steps": "2K",
    "optimizer": {"beta2": 0.95, "weight_decay": 0.1}, "spikes": {"action": "none"},
}  # fmt: skip
WARM_STEPS: Final = 50
POINTS: Final = 200
"""Means of losses that are kept of a run."""


def prepared_from(base: Path, data: Path, steps: int, seed: int) -> Prepared:
    """The training, as the trainer prepares it from its files."""
    lineage = Lineage(operation="import", code_revision="benchmark")
    bundle = Bundle.from_folder(base, lineage=lineage, licence="Apache-2.0")
    settings = parse_settings(json.dumps({**SETTINGS, "max_steps": steps, "seed": seed}))
    prepared = prepare(base, bundle, data, None, settings)
    for refusal in prepared.refusals:
        raise refusal
    return prepared


def ours(base: Path, data: Path, steps: int, seed: int, gpu: int, keep: Path | None) -> dict[str, Any]:
    """The trainer's run, with its checks and checkpoints; its bundle goes to `keep`."""
    prepared = prepared_from(base, data, steps, seed)
    device = prepare_device(0, gpu, gpu + 1)
    torch.manual_seed(seed)
    peak = PeakMemory(device)
    decoder = load_base(base, prepared, device)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), "sha256:" + "0" * 64, prepared, decoder, peak)
        clock = Clock(prepared)
        run.run(lambda report: clock.add(report.loss))
        finish(Path(folder), base, prepared, decoder, [])
        if keep:
            shutil.copytree(Path(folder) / "bundle", keep, dirs_exist_ok=True)
    return clock.row()


def plain(base: Path, data: Path, steps: int, seed: int, gpu: int, keep: Path | None) -> dict[str, Any]:
    """The written-out loop."""
    prepared = prepared_from(base, data, steps, seed)
    torch.cuda.set_device(gpu)
    settings, samples = prepared.settings, prepared.data.samples
    decoder = fresh_decoder(prepared.config, seed=seed, dtype=torch.float32, device="cuda")
    matrices, vectors = ([p for p in decoder.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
    how = settings.optimizer
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": how.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(how.beta1, how.beta2), eps=how.eps, fused=True,
    )  # fmt: skip
    clock, padded = Clock(prepared), 0
    for step in range(prepared.schedule.total_steps):
        rows = [samples[number] for pack in prepared.order.at(step) for number in pack]
        batch, targets = padded_batch(rows)
        padded += len(batch)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = decoder(batch).float()
        loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        loss = loss / sum(row.counted for row in rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), settings.clip_norm)
        for group in adam.param_groups:
            group["lr"] = prepared.schedule.rate(step)
        adam.step()
        adam.zero_grad(set_to_none=True)
        clock.add(loss.item())
    return {**clock.row(), "share_of_padding": 1 - prepared.tokens / padded}


def padded_batch(rows: list[Sample]) -> tuple[Packed, Tensor]:
    """Rows filled up to the longest of them, on the GPU, and their targets [B * L]; what is filled in is ignored."""
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    targets = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)], targets[place, : len(row.ids)] = row.ids, row.targets
    return Packed.of(list(ids), "cuda"), torch.from_numpy(targets.ravel()).cuda()


class Clock:
    """Losses and times of the steps of a run."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._losses: list[float] = []
        self._began_s = 0.0

    def add(self, loss: float) -> None:
        """Takes a step's loss, once it is done."""
        self._losses.append(loss)
        if len(self._losses) == WARM_STEPS:
            self._began_s = time.perf_counter()

    def row(self) -> dict[str, Any]:
        """What the run measured; `losses` are means over equal stretches of steps."""
        torch.cuda.synchronize()
        took_s = time.perf_counter() - self._began_s
        order, steps = self._prepared.order, len(self._losses)
        tokens = order.tokens_in(steps) - order.tokens_in(WARM_STEPS)
        return {
            "steps": steps,
            "tokens": order.tokens_in(steps),
            "seconds": took_s,
            "tokens_per_second": tokens / took_s,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "losses": [float(part.mean()) for part in np.array_split(self._losses, min(POINTS, steps))],
        }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two curves are apart, by the first of them: in the mean, and at the worst place."""
    apart = [abs(a - b) / a for a, b in zip(one["losses"], other["losses"], strict=True)]
    return {"mean": float(np.mean(apart)), "largest": max(apart)}


def main() -> None:
    """Runs all three and saves what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--save", default="pretrain_gpu")
    options = parser.parse_args()
    contenders: list[tuple[str, Callable[..., dict[str, Any]], int, int]] = [
        ("ours", ours, 0, 0),
        ("plain loop", plain, 0, torch.cuda.device_count() - 1),
        ("ours, another seed", ours, 1, 0),
    ]
    lanes = [ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) for _ in range(2)]
    jobs: list[tuple[str, Future[dict[str, Any]]]] = []
    for name, work, seed, gpu in contenders:
        keep = options.keep if name == "ours" else None
        jobs.append((name, lanes[gpu].submit(work, options.base, options.data, options.steps, seed, gpu, keep)))
    rows = [{"contender": name, **job.result()} for name, job in jobs]
    for lane in lanes:
        lane.shutdown()
    mine, theirs, again = rows
    mine["speed_ratio"] = mine["tokens_per_second"] / theirs["tokens_per_second"]
    mine["difference_to_plain_loop"], mine["difference_to_another_seed"] = (
        difference(mine, theirs), difference(mine, again),
    )  # fmt: skip
    results.save(options.save, rows, device=torch.cuda.get_device_name(), torch=torch.__version__, settings=SETTINGS)
    for row in rows:
        print({key: value for key, value in row.items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()
