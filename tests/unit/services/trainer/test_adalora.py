"""AdaLoRA: step for step what PEFT does, resumed to the bit, stored as a plain adapter that PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from training_files import prepared_from, steps_of, write_spec
from training_runs import some_samples

from services.trainer import train_process
from services.trainer.adapters.adalora import AdaloraLinear, Allocation
from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import adapters, merged_state
from services.trainer.adapters.peft_folder import save_adapter
from services.trainer.costs.memory import trainable_parameters
from services.trainer.optim.optimizer import Optimizer
from services.trainer.run.packs import pack_of
from services.trainer.run.step import train_step
from services.trainer.settings.adalora import AdaloraSettings
from services.trainer.settings.training import AdamSettings, LoraSettings, TrainSettings, parse_settings
from smeltkit.errors import BadConfig, JobCancelled, UnsupportedOption
from smeltkit.ml import names
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_weights import load_decoder
from smeltkit.testing.tiny_models import write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
STEPS, RATE = 8, 1e-2
ADALORA = AdaloraSettings(initial_rank=4, warmup_steps=1, final_steps=2, every_steps=2)
LORA = LoraSettings(rank=2, alpha=8, adalora=ADALORA, targets=("attn.q", "attn.v", "mlp.down"))
IDS = list(range(3, 60, 2))


@pytest.fixture
def as_before() -> Iterator[None]:
    """Torch as it was."""
    yield
    torch.use_deterministic_algorithms(False)


def _adapted(folder: Path) -> Decoder:
    torch.manual_seed(0)
    decoder = load_decoder(folder, write_tiny_model(folder, "llama", dtype="F32"))
    attach(decoder, LORA)
    return decoder


def test_every_step_is_that_of_peft(peft: ModuleType, tmp_path: Path) -> None:
    """Losses, ranks that are left and all parameters within 1e-5, through all three phases of the schedule; and what is
    stored at the end computes the same as a plain adapter in PEFT, whose ranks add up to what was asked for."""
    ours = _adapted(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, tinit=1, tfinal=2, deltaT=2, total_step=STEPS, lora_alpha=8, orth_reg_weight=0.5,
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    pairs = _pairs(theirs, ours)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    optimizer, allocation = Optimizer(ours.named_parameters(), AdamSettings()), Allocation(ours, ADALORA, 2, STEPS)
    trained = [value for value in theirs.parameters() if value.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for step, sample in enumerate(some_samples()[:STEPS], start=1):
        penalty = allocation.penalty().item()
        found = train_step(
            ours, optimizer, [pack_of([sample], "cpu")], learning_rate=RATE, clip_norm=1.0, allocation=allocation
        )
        allocation.share_out(step)
        ids = torch.tensor(sample.ids[None].astype("int64"))
        expected = theirs(ids, labels=ids).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        theirs.base_model.update_and_allocate(step)
        adam.zero_grad()
        assert found.loss + penalty == pytest.approx(expected.item(), rel=1e-5)
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            assert torch.equal(mine == 0, other == 0)
    (tmp_path / "adapter").mkdir()
    save_adapter(ours, LORA, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["peft_type"] == "LORA" and sum(told["rank_pattern"].values()) == 2 * len(pairs) // 3
    assert len(set(told["rank_pattern"].values())) > 1
    fresh = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    read = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    logits = read(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours(Packed.of([IDS])), logits, rtol=1e-5, atol=1e-5)
    plain = Decoder(ours.config)
    plain.load_state_dict(merged_state(ours))
    torch.testing.assert_close(plain(Packed.of([IDS])), logits, rtol=1e-4, atol=1e-5)


def _pairs(theirs: Any, ours: Decoder) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Our parameters beside those of PEFT."""
    parameters, found = dict(theirs.named_parameters()), []
    for name, layer in adapters(ours, AdaloraLinear):
        module = names.canonical_to_hf("llama", f"{name}.weight").removesuffix(".weight")
        for own, part in (("a", "lora_A"), ("b", "lora_B"), ("e", "lora_E")):
            found.append((layer.get_parameter(own), parameters[f"base_model.model.{module}.{part}.default"]))
    return found


def test_a_training_stopped_in_the_middle_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    """R-057: before the last ranks are shared out, with dropout; the adapter and what it was merged into."""
    lora = {"rank": 2, "dropout": 0.2, "adalora": {"initial_rank": 4, "final_steps": 2}}
    settings = {"method": "lora", "lora": lora, "max_steps": 6, "learning_rate": "1e-2", "checkpoint_steps": 100}
    train_process.train(tmp_path / "whole", write_spec(tmp_path, "whole", **settings))
    spec, write = write_spec(tmp_path, "parts", **settings), train_process.Journal.write
    with monkeypatch.context() as patch:
        handlers: list[Any] = []
        patch.setattr(train_process.signal, "signal", lambda number, handler: handlers.append(handler))

        def stop(self: Any, report: Any, measured: Any) -> Any:
            if report.step == 3:
                handlers[-1](15, None)
            return write(self, report, measured)

        patch.setattr(train_process.Journal, "write", stop)
        with pytest.raises(JobCancelled):
            train_process.train(tmp_path / "parts", spec)
    train_process.train(tmp_path / "parts", spec)
    found = [[(step["loss"], step["grad_norm"]) for step in steps_of(tmp_path / name)] for name in ("whole", "parts")]
    assert found[0] == found[1]
    for name in ("bundle/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_ranks_fall_along_a_cubic_and_never_come_back(tmp_path: Path) -> None:
    """From all to what was asked for; a layer may lose all of its own, and is then the base's."""
    decoder = _adapted(tmp_path)
    allocation = Allocation(decoder, ADALORA, 2, 12)
    count = len(list(adapters(decoder, AdaloraLinear)))
    budgets = [allocation.budget(step) for step in range(1, 11)]
    assert (budgets[0], budgets[-1]) == (4 * count, 2 * count) and budgets == sorted(budgets, reverse=True)
    assert budgets[5] == int(2 * count * (1 - 5 / 9) ** 3 + 2 * count)
    layers = [layer for _, layer in adapters(decoder, AdaloraLinear)]
    for layer in layers:
        layer.e.data.fill_(1.0)
    layers[0].e.data.zero_()
    state = merged_state(decoder)
    name = next(name for name, _ in adapters(decoder, AdaloraLinear))
    assert torch.equal(state[f"{name}.weight"], layers[0].base.weight)
    (tmp_path / "adapter").mkdir()
    save_adapter(decoder, LORA, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(told["target_modules"]) == len(layers) - 1


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"lora": {"adalora": {"initial_rank": 16}}}, BadConfig, "initial_rank=16 must be above lora.rank=16"),
        ({"lora": {"rank": 4, "dora": True, "adalora": {}}}, UnsupportedOption, "neither with dora"),
        ({"lora": {"rank": 4, "adalora": {"init_rank": 9}}}, BadConfig, "did you mean lora.adalora.initial_rank"),
        ({"lora": {"rank": 4, "adalora": {"orthogonality": 0}}}, BadConfig, "orthogonality=0.0 must be"),
        ({"processes": 2, "lora": {"rank": 4, "adalora": {}}}, UnsupportedOption, "set processes to 1"),
        ({"optimizer": {"offload": True}, "lora": {"rank": 4, "adalora": {}}}, UnsupportedOption, "optimizer.offload"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_settings(json.dumps(value))


def test_a_run_without_steps_to_share_out_ranks_in_is_refused(tmp_path: Path) -> None:
    """In the plan, with its steps; memory counts the ranks that there are at the start."""
    lora = {"rank": 2, "adalora": {"initial_rank": 4, "warmup_steps": 3, "final_steps": 3}}
    (refusal,) = prepared_from(tmp_path, method="lora", max_steps=6, lora=lora).refusals
    assert "leave none of the run's 6 steps" in refusal.message
    settings = TrainSettings(lora=LORA)
    config = prepared_from(tmp_path, method="lora").config
    layers = [layer for _, layer in adapters(_adapted(tmp_path / "llama"), AdaloraLinear)]
    assert trainable_parameters(config, settings) > 0 and all(len(layer.e) == 4 for layer in layers)
