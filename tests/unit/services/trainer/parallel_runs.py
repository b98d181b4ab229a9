"""A small training by any number of processes, and one step of decoders that have everything that can be split.

What is called in other processes by its name; every argument and result is plain or a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import DIGEST, some_samples

from services.trainer.adapters.attach import attach
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.order import Order, Share
from services.trainer.optim.optimizer import Optimizer
from services.trainer.optim.schedule import Schedule
from services.trainer.parallel.context import own_part
from services.trainer.parallel.places import Place
from services.trainer.parallel.ranks import Ranks, joined
from services.trainer.parallel.sharding import is_spread, shard
from services.trainer.run.loop import Run
from services.trainer.run.packs import pack_of
from services.trainer.run.step import train_step
from services.trainer.settings.parallel import ParallelSettings
from services.trainer.settings.training import AdamSettings, LoraSettings, TrainSettings
from smeltkit import limits
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.testing.tiny_models import tiny_config

STEPS = 4
PACK_TOKENS = 61
"""Of at most so many, so that packs are of odd lengths and hold samples that are cut."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "norms of heads, tied head": ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


def train(layout: dict[str, int], rank: int, rendezvous: Path, method: str, folder: Path, steps: int) -> list[Any]:
    """Goes on in `folder` until `steps` steps are done; what is measured of each step, then the weights by name.

    The third step is the first of another stage.
    """
    with _met(layout, rank, rendezvous) as ranks:
        run = _make_run(folder, method, ranks, steps)
        numbers = [
            (report.loss, report.grad_norm, report.tokens, report.counted, report.heldout_loss or 0.0)
            for report in run.steps()
        ]
        weights = {name: _whole(value) for name, value in run.decoder.named_parameters() if value.requires_grad}
        return [*numbers, weights]


def step(layout: dict[str, int], rank: int, rendezvous: Path, model: str) -> list[Any]:
    """Loss and norm of one step of a model and then of the next, with rows of which some teach nothing."""
    with _met(layout, rank, rendezvous) as ranks:
        decoder = _decoder(*MODELS[model])
        decoder.recomputes = True
        shard(decoder, ranks)
        optimizer = Optimizer(decoder.named_parameters(), AdamSettings())
        packs = [own_part(pack_of(some_samples()[first : first + 2], "cpu"), ranks) for first in (0, 2)]
        return [
            (found.loss, found.grad_norm, found.first_grad_norm)
            for found in (train_step(decoder, optimizer, packs, learning_rate=1e-2, clip_norm=1.0, ranks=ranks)
                          for _ in range(3))
        ]  # fmt: skip


@contextmanager
def _met(layout: dict[str, int], rank: int, rendezvous: Path) -> Iterator[Ranks]:
    """The process of that rank among those of an arrangement; none but itself for an empty one."""
    torch.set_num_threads(1)
    count = math.prod(layout.values())
    here = Place(rank=rank, count=count, local_rank=rank, local_count=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "TRAIN_EXCHANGE_TIMEOUT_S", 120.0)
        with joined(here, "cpu", meeting=f"file://{rendezvous}") as met:
            yield replace(met, tensor=layout.get("tensor", 1), context=layout.get("context", 1))


def _make_run(folder: Path, method: str, ranks: Ranks, steps: int) -> Run:
    """A large eps keeps AdamW from making a full update of what is but rounding."""
    decoder, lora = _decoder("qwen2", {}), LoraSettings(rank=4)
    if method == "lora":
        attach(decoder, lora)
    shard(decoder, ranks)
    settings = TrainSettings(
        method=method, sequence_tokens=PACK_TOKENS, packs_per_step=2, processes=ranks.count, checkpoint_steps=100,
        parallel=ParallelSettings(tensor=ranks.tensor, context=ranks.context), stuck_steps=20,
        lora=lora if method == "lora" else LoraSettings(), optimizer=AdamSettings(eps=1e-4),
    )  # fmt: skip
    samples = some_samples()
    lengths = [len(sample.ids) for sample in samples]
    first, later = (
        Order(lengths=lengths, pack_tokens=PACK_TOKENS, packs_per_step=2, seed=1, shares=shares, first_epoch=epoch)
        for epoch, shares in ((0, ()), (1, (Share(first=5, count=11, passes=1.5),)))
    )
    order = Curriculum([(first, 2), (later, STEPS - 2)])
    return Run(
        decoder, samples, order, Schedule(kind="constant", peak=1e-2, warmup_steps=0, total_steps=steps), settings,
        folder=folder, run_digest=DIGEST, peak=PeakMemory("cpu"), heldout=samples[:3], ranks=ranks,
    )  # fmt: skip


def _decoder(architecture: str, overrides: dict[str, Any]) -> Decoder:
    torch.manual_seed(3)
    return Decoder(ModelConfig.from_hf(tiny_config(architecture, **overrides)))


def _whole(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if is_spread(value) else value
    return whole.detach().clone()
