"""One training step: accumulation, clipping, the optimizer that was asked for, numbers that stop a run."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from services.trainer.optim.optimizer import Optimizer
from services.trainer.run.step import Pack, check_numbers, clip_factor, norm_of, train_step
from services.trainer.settings.training import AdamSettings, TrainSettings
from smeltkit.errors import BadConfig, SettingsDiffer, TrainingDiverged
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.testing.tiny_models import tiny_config

CONFIG = AdamSettings(beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.1)


def _decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_hf(tiny_config("qwen2")))


def _pack(*samples: list[int], answers: int = 5) -> Pack:
    """Samples of which only the last `answers` tokens are learnt."""
    targets = [[IGNORED] * (len(ids) - 1 - answers) + ids[-answers:] + [IGNORED] for ids in samples]
    return Pack(batch=Packed.of(samples), targets=torch.tensor(sum(targets, [])), counted=answers * len(samples))


SAMPLES = [torch.randint(0, 380, (length,), generator=torch.Generator().manual_seed(1)).tolist() for length in
           (30, 9, 17, 40, 8, 8, 25, 12)]  # fmt: skip


def test_one_batch_of_eight_equals_eight_of_one() -> None:
    """R-053: loss, norm and updated weights, with unequal numbers of learnt tokens."""
    packs = [_pack(ids, answers=1 + index % 5) for index, ids in enumerate(SAMPLES)]
    whole = Pack(
        batch=Packed.of(SAMPLES),
        targets=torch.cat([pack.targets for pack in packs]),
        counted=sum(pack.counted for pack in packs),
    )
    results = []
    for split in ([whole], packs):
        decoder = _decoder()
        optimizer = Optimizer(decoder.named_parameters(), CONFIG)
        steps = [train_step(decoder, optimizer, split, learning_rate=1e-3, clip_norm=1.0) for _ in range(2)]
        results.append((steps, [parameter.detach().clone() for parameter in decoder.parameters()]))
    for one, other in zip(*(steps for steps, _ in results), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert (one.tokens, one.counted) == (other.tokens, other.counted)
    for one_weight, other_weight in zip(*(weights for _, weights in results), strict=True):
        torch.testing.assert_close(one_weight, other_weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_loss_itself(dtype: str) -> None:
    """R-051: no factor on them in types that need none, and half precision, which would need one, is refused."""
    decoder, pack = _decoder().to(getattr(torch, dtype)), _pack(SAMPLES[0])
    (decoder.loss(pack.batch, pack.targets) / pack.counted).backward()
    expected = float(norm_of([parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]))
    decoder.zero_grad(set_to_none=True)
    optimizer = Optimizer(decoder.named_parameters(), CONFIG)
    found = train_step(decoder, optimizer, [pack], learning_rate=1e-3, clip_norm=1e3).grad_norm
    assert found == pytest.approx(expected, rel=1e-6 if dtype == "float32" else 1e-2)
    with pytest.raises(BadConfig, match="dtype='float16'"):
        TrainSettings(dtype="float16")


def test_clipping_is_that_of_torch() -> None:
    """R-052: one global norm over all gradients, within 1e-5, for norms above and below the bound."""
    for bound in (0.5, 1e6):
        decoder = _decoder()
        decoder.loss(Packed.of(SAMPLES[:1]), torch.tensor(SAMPLES[0])).backward()
        reference = copy.deepcopy([parameter.grad for parameter in decoder.parameters()])
        leaves = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in reference if grad is not None]
        for leaf, grad in zip(leaves, reference, strict=True):
            leaf.grad = grad
        expected = torch.nn.utils.clip_grad_norm_(leaves, bound)
        grads = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
        norm = norm_of(grads)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        factor = clip_factor(norm.item(), bound)
        assert (factor == 1) == (bound == 1e6)
        for grad, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(grad * factor, leaf.grad, rtol=1e-5, atol=1e-9)


def test_update_is_that_of_torch_adamw() -> None:
    """R-047: the configured betas, eps and decay decide the update, and vectors do not decay."""
    ours, theirs = _decoder(), _decoder()
    optimizer = Optimizer(ours.named_parameters(), CONFIG)
    decays = {True: [], False: []}  # type: dict[bool, list[torch.nn.Parameter]]
    for parameter in theirs.parameters():
        decays[parameter.dim() > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.1}, {"params": decays[False], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    pack = _pack(*SAMPLES)
    for _ in range(3):
        train_step(ours, optimizer, [pack], learning_rate=1e-2, clip_norm=1e9)
        adamw.zero_grad()
        theirs.loss(pack.batch, pack.targets, pack.counted).backward()
        adamw.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert optimizer.in_use() == {
        "beta1": 0.8, "beta2": 0.95, "eps": 1e-7, "weight_decay": 0.1, "state": "float32",
        "learning_rate": 1e-2, "offload": False,
    }  # fmt: skip


def test_bf16_weights_move_by_updates_smaller_than_their_rounding() -> None:
    """Small updates add up in the float32 masters until the stored weight moves."""
    decoder = _decoder().to(torch.bfloat16)
    optimizer = Optimizer(decoder.named_parameters(), CONFIG)
    before = decoder.norm.weight.detach().clone()
    for _ in range(12):
        train_step(decoder, optimizer, [_pack(*SAMPLES)], learning_rate=1e-3, clip_norm=1.0)
    assert (decoder.norm.weight != before).any()
    assert decoder.norm.weight.dtype == torch.bfloat16


def test_rounded_state_learns_as_float32_state_does_and_goes_on_as_it_was() -> None:
    """R-047, R-057: losses of 10 steps within 2 % at a rate whose updates bf16 would lose; resumed, the same bits."""
    rounded = replace(CONFIG, beta2=0.999, state="bfloat16")
    trails = []
    for config in (replace(rounded, state="float32"), rounded):
        torch.manual_seed(5)
        decoder = _decoder().to(torch.bfloat16)
        optimizer = Optimizer(decoder.named_parameters(), config)
        assert optimizer.in_use()["state"] == config.state
        pack, losses = _pack(*SAMPLES), []
        for _ in range(10):
            losses.append(train_step(decoder, optimizer, [pack], learning_rate=1e-3, clip_norm=1.0).loss)
        trails.append(losses)
    assert trails[0] == pytest.approx(trails[1], rel=0.02)
    assert trails[1][-1] < trails[1][0] - 0.2
    assert {value.dtype for name, value in optimizer.state().items() if "exp_avg" in name} == {torch.bfloat16}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    other = copy.deepcopy(decoder)
    resumed = Optimizer(other.named_parameters(), rounded)
    resumed.load_state(state)
    for model, own in ((decoder, optimizer), (other, resumed)):
        torch.manual_seed(6)
        train_step(model, own, [pack], learning_rate=1e-3, clip_norm=1.0)
    assert all(map(torch.equal, decoder.parameters(), other.parameters()))


def test_optimizer_state_of_another_model_is_refused() -> None:
    """A resumed run never starts from half a state."""
    decoder = _decoder()
    optimizer = Optimizer(decoder.named_parameters(), CONFIG)
    train_step(decoder, optimizer, [_pack(*SAMPLES)], learning_rate=1e-3, clip_norm=1.0)
    state = optimizer.state()
    state.pop("norm.weight.exp_avg")
    with pytest.raises(SettingsDiffer, match="norm.weight"):
        Optimizer(decoder.named_parameters(), CONFIG).load_state(state)
    with pytest.raises(SettingsDiffer, match="other"):
        Optimizer(decoder.named_parameters(), CONFIG).load_state({**optimizer.state(), "other.exp_avg": torch.ones(1)})


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stop_the_run_before_the_update(poison: float) -> None:
    """R-049, R-050: with the weakest settings there are, the weights stay as they were."""
    decoder = _decoder()
    optimizer = Optimizer(decoder.named_parameters(), AdamSettings())
    with torch.no_grad():
        decoder.norm.weight[0] = poison
    before = [parameter.detach().clone() for parameter in decoder.parameters()]
    with pytest.raises(TrainingDiverged, match="not finite"):
        train_step(decoder, optimizer, [_pack(*SAMPLES)], learning_rate=1e-3, clip_norm=1e30)
    for parameter, old in zip(decoder.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_a_loss_of_exactly_zero_stops_the_run() -> None:
    """R-049: a device error that becomes 0.0 is not progress."""
    with pytest.raises(TrainingDiverged, match="exactly 0"):
        check_numbers(0.0, 1.0)
