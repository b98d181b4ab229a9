"""A small training, the same wherever it is made: `training_runs.py FOLDER METHOD` runs it and prints every step."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from services.trainer.adapters.attach import attach
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.order import Order, Share
from services.trainer.data.samples import Sample
from services.trainer.optim.schedule import Schedule
from services.trainer.parallel.ranks import ALONE
from services.trainer.parallel.sharding import shard
from services.trainer.run.loop import Run
from services.trainer.settings.neftune import NeftuneSettings
from services.trainer.settings.training import LoraSettings, TrainSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import quantize_linears
from smeltkit.ml.kernels import kernels_for
from smeltkit.testing.tiny_models import tiny_config

STEPS = 8
STAGE_STEPS = (3, 5)
"""A second stage, of other samples, follows upon the first."""
DIGEST = "sha256:" + "0" * 64


def make_run(folder: Path, method: str, *, run_digest: str = DIGEST, device: str = "cpu", keep: int = 2) -> Run:
    """A run of eight steps in two stages, with a checkpoint after every second step; spread over who has joined."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    decoder = Decoder(ModelConfig.from_hf(tiny_config("qwen2")), kernels=kernels_for(device)).to(device)
    lora = LoraSettings() if method == "full" else LoraSettings(rank=4, dropout=0.2)
    settings = TrainSettings(
        method=method, lora=lora, epochs=2, sequence_tokens=64, packs_per_step=2, checkpoint_steps=2, stuck_steps=20,
        keep_checkpoints=keep, neftune=NeftuneSettings() if method == "lora" else None,
    )  # fmt: skip
    if method == "qlora":
        quantize_linears(decoder)
    if method != "full":
        attach(decoder, lora)
    shard(decoder, ALONE)
    samples = some_samples()
    lengths = [len(sample.ids) for sample in samples]
    all_, later = (
        (Share(first=0, count=16),),
        (Share(first=0, count=4, passes=0.5), Share(first=6, count=10, passes=1.3)),
    )
    orders = [
        Order(lengths=lengths, pack_tokens=64, packs_per_step=2, seed=1, shares=shares, first_epoch=epoch)
        for epoch, shares in ((0, all_), (2, later))
    ]
    order = Curriculum(list(zip(orders, STAGE_STEPS, strict=True)))
    schedule = Schedule(kind="cosine", peak=1e-2, warmup_steps=0, total_steps=STEPS)
    peak = PeakMemory(device)
    return Run(
        decoder, samples, order, schedule, settings, folder=folder, run_digest=run_digest, peak=peak,
        heldout=samples[:3],
    )  # fmt: skip


def some_samples() -> list[Sample]:
    """Sixteen samples of 10 to 29 random tokens, every one but the first of each learnt."""
    draw = np.random.default_rng(0)
    drawn = (draw.integers(0, 380, draw.integers(10, 30)).astype(np.int32) for _ in range(16))
    return [Sample(ids=ids, targets=np.append(ids[1:], np.int32(-100)).astype(np.int32)) for ids in drawn]


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), sys.argv[2]).run(
        lambda report: print(report.step, report.loss, flush=True)  # noqa: T201
    )
