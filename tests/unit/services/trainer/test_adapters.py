"""LoRA and DoRA adapters: PEFT reads ours, we read PEFT's, and a merge is base + scale B A."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import adapters, merged_state
from services.trainer.adapters.lora import LoraLinear
from services.trainer.adapters.peft_folder import load_adapter, save_adapter
from services.trainer.adapters.targets import linear_names
from services.trainer.settings.training import LoraSettings
from smeltkit.errors import BadConfig, BadFile, TensorMismatch
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_weights import load_decoder
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
IDS = list(range(3, 60, 2))


def _adapted(folder: Path, architecture: str, lora: LoraSettings) -> Decoder:
    """A tiny model with random adapters on it."""
    torch.manual_seed(0)
    decoder = load_decoder(folder, write_tiny_model(folder, architecture, dtype="F32"))
    attach(decoder, lora)
    for _, layer in adapters(decoder, LoraLinear):
        torch.nn.init.normal_(layer.b, std=0.1)
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.2 * torch.randn(len(layer.magnitude))
    return decoder


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("options", [{}, {"rank_stabilized": True}, {"dora": True}], ids=str)
def test_peft_computes_the_same_from_our_folder(
    peft: ModuleType, tmp_path: Path, architecture: str, options: dict[str, bool]
) -> None:
    """Logits and loss through transformers and PEFT equal ours in fp32, and so does the gradient of every parameter."""
    lora = LoraSettings(rank=4, alpha=12, **options)
    ours = _adapted(tmp_path / "base", architecture, lora)
    (tmp_path / "adapter").mkdir()
    save_adapter(ours, lora, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    expected = theirs(torch.tensor([IDS]), labels=torch.tensor([IDS]))
    logits = ours(Packed.of([IDS]))
    torch.testing.assert_close(logits, expected.logits[0], rtol=1e-5, atol=1e-5)
    loss = ours.loss(Packed.of([IDS]), torch.tensor([*IDS[1:], -100])).div(len(IDS) - 1)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    grads = [p.grad.norm() for name, p in theirs.named_parameters() if "lora_" in name and p.grad is not None]
    mine = [p.grad.norm() for p in ours.parameters() if p.grad is not None]
    assert len(grads) == len(mine) == 2 * (3 if lora.dora else 2) * len(linear_names(ours.config))
    torch.testing.assert_close(torch.stack(sorted(mine)), torch.stack(sorted(grads)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_we_compute_the_same_from_pefts_folder(peft: ModuleType, tmp_path: Path, dora: bool) -> None:
    """An adapter made by PEFT gives here the logits that it gives there."""
    config = write_tiny_model(tmp_path, "qwen2", dtype="F32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True, init_lora_weights=False,
        use_dora=dora,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = load_decoder(tmp_path, config)
    found = load_adapter(ours, tmp_path / "adapter")
    assert found == LoraSettings(rank=3, alpha=5, rank_stabilized=True, dora=dora, targets=("attn.q", "mlp.down"))
    expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours(Packed.of([IDS])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_are_base_plus_scaled_product(tmp_path: Path, dora: bool) -> None:
    """R-001: every declared layer is changed, by scale B A and by nothing else, and generates the same logits.

    With DoRA each row of that sum is then as long as its magnitude says.
    """
    lora = LoraSettings(rank=4, alpha=12, dora=dora)
    ours = _adapted(tmp_path, "phi3", lora)
    base = load_decoder(tmp_path, ours.config).state_dict()
    state = merged_state(ours)
    carriers = dict(adapters(ours, LoraLinear))
    for name, value in base.items():
        layer = carriers.get(name.removesuffix(".weight"))
        expected = value if layer is None else value + 3.0 * layer.b @ layer.a
        if layer is not None and layer.magnitude is not None:
            expected = expected * (layer.magnitude / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-6)
    assert len(carriers) == 2 * len(linear_names(ours.config))
    plain = Decoder(ours.config)
    plain.load_state_dict(state)
    batch = Packed.of([torch.randint(0, 380, (40,)).tolist()])
    torch.testing.assert_close(plain(batch), ours(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_backward_pass_of_an_adapted_layer_is_right(dora: bool) -> None:
    """R-054: numeric gradients in float64, and the same values as with dropout's path at a rate of nearly nothing.

    DoRA's norm counts as a constant, so its gradients are held against PEFT's instead, above.
    """
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5), LoraSettings(rank=2, dora=dora)).double().requires_grad_(True)
    layer.base.requires_grad_(False)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.magnitude) if dora else (x, layer.a, layer.b))
    plain = layer(x)
    layer.dropout = 1e-12
    torch.testing.assert_close(layer(x), plain)


def test_an_untrained_adapter_is_not_merged() -> None:
    """R-001: handing back the unchanged base is never success."""
    decoder = Decoder(ModelConfig.from_hf(tiny_config("qwen2")))
    with pytest.raises(TensorMismatch, match="no adapter"):
        merged_state(decoder)
    attach(decoder, LoraSettings())
    with pytest.raises(TensorMismatch, match="changes nothing"):
        merged_state(decoder)


def test_targets_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """R-002: an adapter for other modules is an error, not an adapter on fewer layers."""
    decoder = Decoder(ModelConfig.from_hf(tiny_config("phi3")))
    with pytest.raises(BadConfig, match="attn.qkv"):
        attach(decoder, LoraSettings(targets=("attn.q",)))
    lora = LoraSettings(rank=2)
    save_adapter(_adapted(tmp_path, "llama", lora), lora, tmp_path)
    with pytest.raises(TensorMismatch):
        load_adapter(decoder, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("use_qalora", True), ("bias", "all"), ("rank_pattern", {"q_proj": 2})])
def test_settings_of_peft_that_we_do_not_honour_are_refused(tmp_path: Path, key: str, value: object) -> None:
    """An ignored setting would give another model than the one that was trained."""
    lora = LoraSettings(rank=2)
    save_adapter(_adapted(tmp_path, "llama", lora), lora, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadFile, match=key):
        load_adapter(Decoder(ModelConfig.from_hf(tiny_config("llama"))), tmp_path)
