"""Optimizer state in 8 bits or in the host's memory: learns as float32 state does, and goes on as it was."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from training_runs import some_samples

from services.trainer.costs.memory import components, state_bytes
from services.trainer.optim.optimizer import Optimizer
from services.trainer.run.packs import pack_of
from services.trainer.run.step import train_step
from services.trainer.settings.training import AdamSettings, TrainSettings
from smeltkit.errors import UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.int8 import BLOCK, zeros
from smeltkit.ml.kernels import reference
from smeltkit.testing.tiny_models import tiny_config

STEPS = 8


def _trained(config: AdamSettings) -> tuple[Decoder, Optimizer, list[float]]:
    """A tiny decoder after STEPS steps on few samples, its optimizer, its losses."""
    torch.manual_seed(4)
    decoder = Decoder(ModelConfig.from_hf(tiny_config("qwen2"))).to(torch.bfloat16)
    optimizer = Optimizer(decoder.named_parameters(), config)
    packs = [pack_of(some_samples()[:6], "cpu")]
    losses = [train_step(decoder, optimizer, packs, learning_rate=2e-3, clip_norm=1.0).loss for _ in range(STEPS)]
    return decoder, optimizer, losses


@cache
def _exact() -> tuple[Decoder, Optimizer, list[float]]:
    """The same with float32 state, which nobody changes afterwards."""
    return _trained(AdamSettings())


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_block_is_rounded_to_the_nearest_of_its_numbers(is_signed: bool) -> None:
    """Within half the widest gap of the block's largest value, and 7 % of a value in its upper decade; zero is kept."""
    torch.manual_seed(0)
    values = torch.randn(1000) * torch.logspace(-6, 2, 1000)
    values = values if is_signed else values.square()
    values[:BLOCK:7] = 0
    coded, again = (zeros(1000, is_signed=is_signed, device=values.device) for _ in range(2))
    assert not coded.values().any()
    coded.write(values)
    found = coded.values()
    largest = coded.scales.repeat_interleave(BLOCK)[:1000]
    assert (coded.codes.dtype, len(coded.scales)) == (torch.uint8, 4)
    assert ((found - values).abs() <= 0.008 * largest).all()
    upper = values.abs() > 0.1 * largest
    assert ((found - values).abs()[upper] <= 0.071 * values.abs()[upper]).all()
    again.write(found)
    assert (found[values == 0] == 0).all() and torch.equal(again.codes, coded.codes)
    assert is_signed or (found[values > 0] > 0).all()


def test_state_of_8_bits_learns_as_float32_state_does() -> None:
    """R-047: every loss of 8 steps, in which it falls by a third, within 2 %; small tensors stay exact."""
    _, exact, expected = _exact()
    _, optimizer, losses = _trained(AdamSettings(state="int8"))
    assert losses == pytest.approx(expected, rel=0.02) and losses[-1] < 0.67 * losses[0]
    assert optimizer.in_use()["state"] == "int8"

    def size_bytes(found: Optimizer) -> int:
        return sum(value.nbytes for key, value in found.state().items() if ".exp_avg" in key)

    assert size_bytes(optimizer) < 0.3 * size_bytes(exact)


def test_state_of_8_bits_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-057: resumed from what was stored, and updated piece by piece, the next weights are the same bits."""
    decoder, optimizer, _ = _trained(AdamSettings(state="int8"))
    other = copy.deepcopy(decoder)
    resumed = Optimizer(other.named_parameters(), AdamSettings(state="int8"))
    resumed.load_state({name: value.clone() for name, value in optimizer.state().items()})
    packs = [pack_of(some_samples()[6:9], "cpu")]
    train_step(decoder, optimizer, packs, learning_rate=1e-3, clip_norm=1.0)
    monkeypatch.setattr(reference, "_PART", 16 * BLOCK)
    train_step(other, resumed, packs, learning_rate=1e-3, clip_norm=1.0)
    assert all(map(torch.equal, decoder.parameters(), other.parameters()))


def test_an_offloaded_optimizer_makes_the_same_updates() -> None:
    """R-047: copies of its own in float32, the same losses, and its state says so."""
    decoder, optimizer, losses = _trained(AdamSettings(offload=True))
    assert losses == pytest.approx(_exact()[2], rel=1e-5) and optimizer.in_use()["offload"]
    masters = {name: value for name, value in optimizer.state().items() if name.endswith(".master")}
    assert len(masters) == len(optimizer.names)
    assert not {value.data_ptr() for value in masters.values()} & {value.data_ptr() for value in decoder.parameters()}


def test_the_plan_counts_state_where_it_lies() -> None:
    """R-068: 8 bits are a quarter of float32; what is offloaded takes none of the GPU's memory."""
    config = ModelConfig.from_hf(tiny_config("qwen2"))

    def planned(**how: Any) -> dict[str, int]:
        return components(config, TrainSettings(method="full", dtype="bfloat16", optimizer=AdamSettings(**how)))

    assert planned(state="int8")["optimizer"] == pytest.approx(planned()["optimizer"] / 4, rel=0.02)
    assert (planned(offload=True)["optimizer"], planned(offload=True)["masters"]) == (0, 0)
    hosted = state_bytes(config, TrainSettings(method="full", optimizer=AdamSettings(offload=True)))
    assert hosted == {"masters": 4 * config.parameters, "optimizer": 8 * config.parameters}
    with pytest.raises(UnsupportedOption, match="processes=2"):
        TrainSettings(method="full", processes=2, optimizer=AdamSettings(state="int8"))
