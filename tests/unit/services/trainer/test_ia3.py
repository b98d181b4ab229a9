"""(IA)^3: PEFT reads ours, we read PEFT's, a merge is the base scaled, and a training of it ends in a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from training_files import steps_of, write_spec

from services.trainer import train_process
from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import adapters, merged_state
from services.trainer.adapters.ia3 import Ia3Linear
from services.trainer.adapters.peft_folder import load_adapter, save_adapter
from services.trainer.costs.memory import components, trainable_parameters
from services.trainer.settings.ia3 import Ia3Settings
from services.trainer.settings.training import TrainSettings, parse_settings
from smeltkit.errors import BadConfig, TensorMismatch, UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_weights import load_decoder
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
IDS = list(range(3, 60, 2))


@pytest.fixture
def as_before() -> Iterator[None]:
    """Torch as it was."""
    yield
    torch.use_deterministic_algorithms(False)


def _scaled(folder: Path, architecture: str, ia3: Ia3Settings) -> Decoder:
    """A tiny model with random vectors on it, and random biases if it has any."""
    torch.manual_seed(0)
    config = write_tiny_model(folder, architecture, dtype="F32")
    decoder = load_decoder(folder, config)
    attach(decoder, ia3)
    for _, layer in adapters(decoder, Ia3Linear):
        torch.nn.init.normal_(layer.scales, mean=1.0, std=0.3)
    return decoder


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ()), ("qwen2", ()), ("phi3", ("attn.qkv", "mlp.down")), ("qwen3", ("attn.q", "attn.o", "mlp.gate"))],
)
def test_peft_computes_the_same_as_our_vectors(
    peft: ModuleType, tmp_path: Path, architecture: str, targets: tuple[str, ...]
) -> None:
    """Logits, loss and the gradient of every vector through transformers and PEFT equal ours in float32."""
    ia3 = Ia3Settings(targets=targets) if targets else Ia3Settings()
    ours = _scaled(tmp_path / "base", architecture, ia3)
    (tmp_path / "adapter").mkdir()
    save_adapter(ours, ia3, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    expected = theirs(torch.tensor([IDS]), labels=torch.tensor([IDS]))
    torch.testing.assert_close(ours(Packed.of([IDS])), expected.logits[0], rtol=1e-5, atol=1e-5)
    loss = ours.loss(Packed.of([IDS]), torch.tensor([*IDS[1:], -100])).div(len(IDS) - 1)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    grads = [value.grad.flatten() for name, value in theirs.named_parameters() if value.grad is not None]
    mine = [value.grad for value in ours.parameters() if value.grad is not None]
    assert len(mine) == len(grads) == ours.config.layers * len(ia3.targets)
    for own, other in zip(sorted(mine, key=_place), sorted(grads, key=_place), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def _place(value: torch.Tensor) -> tuple[int, int]:
    """A place in an order that rounding does not change."""
    return len(value), round(value.norm().item() * 1e4)


def test_we_compute_the_same_from_a_folder_of_peft(peft: ModuleType, tmp_path: Path) -> None:
    """Vectors made by PEFT give here the logits that they give there; one on the other side of a layer is refused."""
    config = write_tiny_model(tmp_path, "qwen2", dtype="F32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    modules = ["q_proj", "v_proj", "down_proj"]
    settings = peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"], init_ia3_weights=False)
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = load_decoder(tmp_path, config)
    assert load_adapter(ours, tmp_path / "adapter") == Ia3Settings(targets=("attn.q", "attn.v", "mlp.down"))
    expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours(Packed.of([IDS])), expected, rtol=1e-5, atol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    other = peft.IA3Config(target_modules=modules, feedforward_modules=["v_proj"])
    peft.get_peft_model(base, other).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(TensorMismatch, match=r"has shape \(1, "):
        load_adapter(load_decoder(tmp_path, config), tmp_path / "other")


def test_merged_weights_are_the_base_scaled(tmp_path: Path) -> None:
    """R-001: rows of keys and values with their biases, columns of the MLP's last layer; the same logits, on random
    tokens. Vectors of ones are no result."""
    ours = _scaled(tmp_path, "qwen2", Ia3Settings())
    base, state = load_decoder(tmp_path, ours.config).state_dict(), merged_state(ours)
    carriers = dict(adapters(ours, Ia3Linear))
    assert len(carriers) == 3 * ours.config.layers
    for name, value in base.items():
        owner, _, leaf = name.rpartition(".")
        layer, expected = carriers.get(owner), value
        if layer is not None and layer.scales_inputs:
            expected = value * layer.scales if leaf == "weight" else value
        elif layer is not None:
            expected = value * (layer.scales[:, None] if leaf == "weight" else layer.scales)
        torch.testing.assert_close(state[name], expected, rtol=0, atol=0)
    plain = Decoder(ours.config)
    plain.load_state_dict(state)
    batch = Packed.of([torch.randint(0, 380, (40,)).tolist()])
    torch.testing.assert_close(plain(batch), ours(batch), rtol=1e-4, atol=1e-4)
    untrained = load_decoder(tmp_path, ours.config)
    attach(untrained, Ia3Settings())
    with pytest.raises(TensorMismatch, match="changes nothing"):
        merged_state(untrained)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_plan_counts_every_vector(architecture: str) -> None:
    """R-068: values of all vectors, and the optimizer's state of them."""
    config = ModelConfig.from_hf(tiny_config(architecture))
    decoder, settings = Decoder(config), TrainSettings(method="ia3")
    attach(decoder, settings.ia3)
    trained = sum(value.numel() for value in decoder.parameters() if value.requires_grad)
    assert trainable_parameters(config, settings) == trained > 0
    assert components(config, settings)["optimizer"] == 8 * trained


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"method": "ia3", "lora": {"rank": 4}}, "lora settings have no effect with method ia3"),
        ({"method": "lora", "ia3": {"targets": ["attn.k"]}}, "ia3 settings have no effect with method lora"),
        ({"method": "ia3", "optimizer": {"weight_decay": 0.1}}, "weight_decay .* no effect on vectors"),
        ({"method": "ia3", "processes": 2, "parallel": {"tensor": 2}}, "nor vectors of ia3"),
    ],
)
def test_settings_without_effect_on_vectors_are_refused(value: dict[str, Any], says: str) -> None:
    """R-006: what this mode does not read is an error."""
    with pytest.raises(UnsupportedOption, match=says):
        parse_settings(json.dumps(value))


def test_a_model_without_such_layers_is_refused() -> None:
    """R-002: keys that are stored with queries cannot be scaled alone; the layers that there are get named."""
    with pytest.raises(BadConfig, match=r"ia3.targets: 'attn.k' is no linear layer of this model; it has attn.qkv"):
        attach(Decoder(ModelConfig.from_hf(tiny_config("phi3"))), Ia3Settings())


def test_a_training_of_vectors_ends_in_a_bundle(tmp_path: Path, as_before: None) -> None:
    """R-048: only they move; their folder and the merged weights lie beside each other, and mean the same."""
    spec = write_spec(tmp_path, "run", method="ia3", max_steps=3, learning_rate="1e-2")
    outcome = train_process.train(tmp_path / "run", spec)
    assert outcome["cost"]["tokens"] > 0 and len(steps_of(tmp_path / "run")) == 3
    config = ModelConfig.from_hf(json.loads((tmp_path / "base" / "config.json").read_text()))
    adapted = load_decoder(tmp_path / "base", config)
    assert load_adapter(adapted, tmp_path / "run" / "adapter") == Ia3Settings()
    merged = load_decoder(tmp_path / "run" / "bundle", config).state_dict()
    for name, value in merged_state(adapted).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=0)
