"""Pre-training a small model by the trainer's own run against a loop written out in plain torch, over the same steps.

    python -m benchmarks.gpu.pretrain BASE DATA [--seconds S] [--keep FOLDER]

BASE is a bundle's folder: its shape and tokenizer are taken, the weights begin at random. Both sides get the same
weights, rows, order and rates. The plain loop does as such loops do: float32 weights under bf16 autocast, rows padded
to the longest of their step, whole logits, torch's fused AdamW. Speed counts tokens of rows, never padding, from the
50th step on and with everything between two steps. A third run differs from ours by nothing but its seed: how far its
losses are from ours is the noise that the difference to the plain loop is held against. A short run of ours tells how
many steps fill the seconds; the other two end after `--limit` seconds at the latest, and curves are compared as far as
both reach. With two GPUs the plain loop has one of them for itself, else one contender follows the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import results
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.samples import Sample
from services.trainer.plan import Prepared, prepare
from services.trainer.run.device import prepare_device
from services.trainer.run.fresh import fresh_decoder
from services.trainer.settings.training import parse_settings
from services.trainer.train_process import finish, load_base, make_run
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.lineage import Lineage

SETTINGS: Final[dict[str, Any]] = {
    "method": "pretrain", "init": "random", "dtype": "bfloat16", "epochs": 1000, "sequence_tokens": "2K",
    "pack_tokens": "64K", "packs_per_step": 1, "learning_rate": "1e-3", "checkpoint_steps": "2K",
    "optimizer": {"beta2": 0.95, "weight_decay": 0.1}, "spikes": {"action": "none"},
}  # fmt: skip
WARMUP_STEPS: Final = 100
"""Of the learning rate, in a run long enough."""
WARM_STEPS: Final = 50
"""Steps before speed counts."""
TRIED_STEPS: Final = 250
POINTS: Final = 200
"""Means of losses that are kept of a run."""


def prepared_from(base: Path, data: Path, steps: int, seed: int) -> Prepared:
    """The training, as the trainer prepares it from its files."""
    lineage = Lineage(operation="import", code_revision="benchmark")
    bundle = Bundle.from_folder(base, lineage=lineage, licence="Apache-2.0")
    run = {"max_steps": steps, "warmup_steps": min(WARMUP_STEPS, steps // 10), "seed": seed}
    settings = parse_settings(json.dumps({**SETTINGS, **run}))
    prepared = prepare(base, bundle, [data], None, settings)
    for refusal in prepared.refusals:
        raise refusal
    return prepared


def ours(
    base: Path, data: Path, steps: int, seed: int, gpu: int, limit_s: float, keep: Path | None = None
) -> dict[str, Any]:
    """The trainer's run, with its checks and checkpoints; its bundle goes to `keep`."""
    prepared = prepared_from(base, data, steps, seed)
    device = prepare_device(0, gpu, gpu + 1)
    torch.manual_seed(seed)
    peak = PeakMemory(device)
    decoder = load_base(base, prepared, device)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), "sha256:" + "0" * 64, prepared, decoder, peak)
        clock = Clock(prepared, limit_s)
        for report in run.steps():
            if clock.add(report.loss):
                break
        row = clock.row()
        if keep:
            finish(Path(folder), base, prepared, decoder, [])
            shutil.copytree(Path(folder) / "bundle", keep, dirs_exist_ok=True)
    return row


def plain(base: Path, data: Path, steps: int, seed: int, gpu: int, limit_s: float) -> dict[str, Any]:
    """The written-out loop."""
    prepared = prepared_from(base, data, steps, seed)
    torch.cuda.set_device(gpu)
    settings, samples = prepared.settings, prepared.samples
    decoder = fresh_decoder(prepared.config, seed=seed, dtype=torch.float32, device="cuda")
    matrices, vectors = ([p for p in decoder.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
    how = settings.optimizer
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": how.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(how.beta1, how.beta2), eps=how.eps, fused=True,
    )  # fmt: skip
    clock, padded = Clock(prepared, limit_s), 0
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
        if clock.add(loss.item()):
            break
    return {**clock.row(), "share_of_padding": 1 - clock.tokens / padded}


def padded_batch(rows: list[Sample]) -> tuple[Packed, Tensor]:
    """Rows filled up to the longest of them, on the GPU, and their targets [B * L]; what is filled in is ignored."""
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    targets = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)], targets[place, : len(row.ids)] = row.ids, row.targets
    return Packed.of(list(ids), "cuda"), torch.from_numpy(targets.ravel()).cuda()


class Clock:
    """Losses and times of the steps of a run, which is to end after `limit_s` seconds."""

    def __init__(self, prepared: Prepared, limit_s: float) -> None:
        self._prepared, self._limit_s = prepared, limit_s
        self._losses: list[float] = []
        self._began_s = time.perf_counter()

    def add(self, loss: float) -> bool:
        """Takes a step's loss, once it is done; whether it was the last one."""
        self._losses.append(loss)
        if len(self._losses) == WARM_STEPS:
            self._began_s = time.perf_counter()
        total = self._prepared.schedule.total_steps
        return len(self._losses) == total or time.perf_counter() - self._began_s > self._limit_s

    @property
    def tokens(self) -> int:
        """Tokens of the rows so far."""
        return self._prepared.order.tokens_in(len(self._losses))

    def row(self) -> dict[str, Any]:
        """What the run measured; `losses` are means over equal stretches of the planned steps, whole ones only."""
        torch.cuda.synchronize()
        took_s = time.perf_counter() - self._began_s
        size = max(self._prepared.schedule.total_steps // POINTS, 1)
        whole = len(self._losses) // size * size
        return {
            "steps": len(self._losses),
            "tokens": self.tokens,
            "seconds": took_s,
            "tokens_per_second": (self.tokens - self._prepared.order.tokens_in(WARM_STEPS)) / took_s,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "losses": np.array(self._losses[:whole]).reshape(-1, size).mean(1).tolist(),
        }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two curves are apart, by the first of them, where there are both: in the mean, and at the worst place."""
    apart = [abs(a - b) / a for a, b in zip(one["losses"], other["losses"], strict=False)]
    return {"mean": float(np.mean(apart)), "largest": max(apart)}


def main() -> None:
    """Runs all three and saves what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--limit", type=float, default=900.0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--save", default="pretrain_gpu")
    options = parser.parse_args()
    lanes = [ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) for _ in range(2)]
    files, last = (options.base, options.data), torch.cuda.device_count() - 1
    tried = lanes[0].submit(ours, *files, TRIED_STEPS, 0, 0, options.limit).result()
    steps = int(options.seconds / tried["seconds"] * (TRIED_STEPS - WARM_STEPS))
    print(f"{steps} steps", flush=True)
    jobs: dict[str, Future[dict[str, Any]]] = {
        "ours": lanes[0].submit(ours, *files, steps, 0, 0, options.limit, options.keep),
        "plain loop": lanes[last].submit(plain, *files, steps, 0, last, options.limit),
        "ours, another seed": lanes[0].submit(ours, *files, steps, 1, 0, options.limit),
    }
    rows = []
    for name, job in jobs.items():
        rows.append({"contender": name, **job.result()})
        print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    for lane in lanes:
        lane.shutdown()
    mine, theirs, again = rows
    mine["speed_ratio"] = mine["tokens_per_second"] / theirs["tokens_per_second"]
    mine["difference_to_plain_loop"], mine["difference_to_another_seed"] = (
        difference(mine, theirs), difference(mine, again),
    )  # fmt: skip
    results.save(options.save, rows, device=torch.cuda.get_device_name(), torch=torch.__version__, settings=SETTINGS)
    print(*(f"{key} {mine[key]}" for key in mine if key.startswith(("speed", "difference"))), sep="\n")


if __name__ == "__main__":
    main()
