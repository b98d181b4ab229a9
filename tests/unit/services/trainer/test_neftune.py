"""Noise on embeddings: the formula as it is written, per sample, in training alone, and from the kept random state."""

from __future__ import annotations

import math

import pytest
import torch
from training_runs import some_samples

from services.trainer.parallel.context import own_part
from services.trainer.parallel.ranks import Ranks
from services.trainer.run.heldout import row_losses
from services.trainer.run.neftune import noise_of
from services.trainer.run.packs import pack_of
from services.trainer.settings.training import parse_settings
from smeltkit.errors import UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.testing.tiny_models import tiny_config

LENGTHS, ALPHA = (7, 30, 2), 5.0


def test_noise_is_uniform_within_the_bound_of_each_sample() -> None:
    """alpha / sqrt(L d) of the sample's own L, as arXiv:2310.05914 writes it; nearly reached, and zero in the mean."""
    width = 256
    batch = Packed.of([[0] * length for length in LENGTHS])
    torch.manual_seed(1)
    found = noise_of(ALPHA)(torch.zeros(sum(LENGTHS), width), batch)
    torch.manual_seed(1)
    drawn = torch.empty(sum(LENGTHS), width).uniform_(-1, 1)
    for own, draw, length in zip(found.split(LENGTHS), drawn.split(LENGTHS), LENGTHS, strict=True):
        bound = ALPHA / math.sqrt(length * width)
        torch.testing.assert_close(own, draw * bound)
        assert 0.98 * bound < own.abs().max() <= bound and abs(own.mean()) < 0.1 * bound


def test_processes_that_share_a_pack_bound_it_by_the_whole_sample() -> None:
    """A sample that is cut keeps its length."""
    pack = pack_of(some_samples()[:3], "cpu")
    whole = pack.batch.sample_tokens.tolist()
    parts = [own_part(pack, Ranks(rank=rank, count=2, context=2)).batch for rank in range(2)]
    own = [pair for part in parts for pair in zip(part.positions.tolist(), part.sample_tokens.tolist(), strict=True)]
    wanted = sorted(zip(pack.batch.positions.tolist(), whole, strict=True))
    fill = len(own) - len(whole)
    assert sorted(own) == sorted([*wanted, *((place, fill) for place in range(fill))])


def test_a_decoder_adds_it_in_training_alone() -> None:
    """Exactly what is drawn, before the first layer; what is held out is measured as without it."""
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_hf(tiny_config("qwen2")))
    samples = some_samples()[:3]
    batch = pack_of(samples, "cpu").batch
    plain, losses = decoder.train().hidden(batch), row_losses(decoder, samples)
    decoder.noise = noise_of(ALPHA)
    assert row_losses(decoder, samples) == losses
    decoder.train()
    torch.manual_seed(2)
    noisy = decoder.hidden(batch)
    assert not torch.equal(noisy, plain)
    torch.manual_seed(2)
    added = noise_of(ALPHA)(decoder.embed(batch.ids), batch)
    decoder.noise = lambda x, _: added
    torch.testing.assert_close(decoder.hidden(batch), noisy, rtol=0, atol=0)


def test_processes_that_compute_a_token_together_are_refused() -> None:
    """Each would draw noise of its own, and what leaves a layer would be the sum over different inputs."""
    with pytest.raises(UnsupportedOption, match="parallel.tensor=2 computes each token in several processes"):
        parse_settings('{"neftune": {"alpha": 5}, "processes": 2, "parallel": {"tensor": 2}}')
    assert parse_settings('{"neftune": null}').neftune is None
