"""QLoRA: a base in NF4 that stays as it is, an adapter that learns on it, a merge of exactly the two."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional
from training_runs import make_run

from services.trainer import train_process
from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import adapters, merged_state
from services.trainer.adapters.lora import LoraLinear
from services.trainer.adapters.peft_folder import BASE_FILE, load_adapter, save_adapter
from services.trainer.costs.memory import components
from services.trainer.settings.training import LoraSettings, TrainSettings, parse_settings
from services.trainer.work import plain
from smeltkit.errors import TensorMismatch, UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import Nf4Linear, dequantization, quantize_linears
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_weights import load_decoder, save_weights
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
IDS = list(range(3, 60, 2))
LORA = LoraSettings(rank=4, alpha=12)


def _quantized(architecture: str = "qwen2", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig.from_hf(tiny_config(architecture)))
    quantize_linears(decoder)
    return decoder


def _plain(decoder: Decoder) -> Decoder:
    """The same model with every quantized layer as floats."""
    found = Decoder(decoder.config)
    names = [spec.name.rpartition(".") for spec in decoder.config.tensors()]
    found.load_state_dict({f"{owner}.{leaf}": getattr(decoder.get_submodule(owner), leaf) for owner, _, leaf in names})
    return found


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_a_quantized_decoder_computes_with_the_dequantized_weights(architecture: str) -> None:
    """R-027: logits and gradients are, to the bit, those of the same weights as floats; every block's layer is NF4."""
    ours = _quantized(architecture)
    theirs, batch = _plain(ours), Packed.of([IDS])
    kinds = [type(module) for layer in ours.layers for module in layer.modules()]
    assert torch.nn.Linear not in kinds and Nf4Linear in kinds
    grads = []
    for decoder in (ours, theirs):
        decoder.requires_grad_(False)
        decoder.embed.weight.requires_grad_(True)
        decoder.loss(batch, torch.tensor([*IDS[1:], -100])).backward()
        grads.append(decoder.embed.weight.grad)
    assert torch.equal(ours(batch), theirs(batch))
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def test_qlora_learns_and_its_base_stays(tmp_path: Path) -> None:
    """R-048: the loss falls over a whole run, with every check of a run on, and not a bit of the base moves."""
    run = make_run(tmp_path, "qlora")
    before = dequantization(run.decoder)
    losses: list[float] = []
    run.run(lambda report: losses.append(report.loss))
    assert losses[-1] < losses[0] - 0.05
    assert dequantization(run.decoder) == before and before["scheme"] == "nf4"


@pytest.mark.parametrize("targets", [(), ("attn.q", "mlp.down")], ids=["all", "some"])
def test_merged_is_the_dequantized_base_plus_the_product(targets: tuple[str, ...]) -> None:
    """R-019, R-027: W is what the adapter was trained on, and the merged model computes what the adapted one does."""
    ours = _quantized()
    base = _plain(ours).state_dict()
    attach(ours, replace(LORA, targets=targets))
    for _, layer in adapters(ours, LoraLinear):
        torch.nn.init.normal_(layer.b, std=0.1)
    state, carriers = merged_state(ours), dict(adapters(ours, LoraLinear))
    for name, value in base.items():
        layer = carriers.get(name.removesuffix(".weight"))
        expected = value if layer is None else value + 3.0 * layer.b @ layer.a
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-6)
    whole = Decoder(ours.config)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(Packed.of([IDS])), ours(Packed.of([IDS])), rtol=1e-4, atol=1e-4)


def test_peft_computes_the_same_on_the_dequantized_base(peft: ModuleType, tmp_path: Path) -> None:
    """Our folder on top of the base that it names gives our logits there."""
    config = write_tiny_model(tmp_path, "qwen2", dtype="F32")
    ours = load_decoder(tmp_path, config)
    quantize_linears(ours)
    save_weights(tmp_path, config, _plain(ours).state_dict(), "F32")
    attach(ours, LORA)
    for _, layer in adapters(ours, LoraLinear):
        torch.nn.init.normal_(layer.b, std=0.1)
    (tmp_path / "adapter").mkdir()
    assert tmp_path / "adapter" / BASE_FILE in save_adapter(ours, LORA, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours(Packed.of([IDS])), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_goes_onto_no_other_base(tmp_path: Path) -> None:
    """R-027: other weights, or the same ones unquantized, are refused unless any base is allowed."""
    ours = _quantized()
    attach(ours, LORA)
    save_adapter(ours, LORA, tmp_path)
    load_adapter(_quantized(), tmp_path)
    floats = Decoder(ours.config)
    for other in (_quantized(seed=1), floats):
        with pytest.raises(TensorMismatch, match="trained on the base"):
            load_adapter(other, tmp_path)
    assert load_adapter(floats, tmp_path, to_any_base=True).rank == LORA.rank


def test_a_whole_process_ends_in_a_merged_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-016, R-027: from settings to files; the outcome names the base it was trained on, held-out rows get better."""
    monkeypatch.setattr(
        train_process, "Paces", lambda *_: SimpleNamespace(of=lambda _: None, learn=lambda *_: None), raising=False
    )
    write_tiny_model(tmp_path / "base", "qwen3", is_chat=False)
    lines = [json.dumps({"text": f"{n} + 1 is {n + 1}, and so on."}) + "\n" for n in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "rows.jsonl").write_text("".join(lines[:6]))
    settings = TrainSettings(method="qlora", epochs=2, sequence_tokens=128, packs_per_step=2, lora=LORA)
    spec = {
        "settings": plain(replace(settings, learning_rate=5e-3)),
        "base": str(tmp_path / "base"),
        "data": [str(tmp_path / "data.jsonl")],
        "heldout": str(tmp_path / "rows.jsonl"),
        "lineage": Lineage(operation="import", code_revision="test").to_dict(),
        "licence": "Apache-2.0",
        "threads": 1,
        "paces": str(tmp_path / "paces"),
        "run_digest": "sha256:" + hashlib.sha256(b"").hexdigest(),
    }
    try:
        outcome = train_process.train(tmp_path, spec)
    finally:
        torch.use_deterministic_algorithms(False)
    assert outcome["heldout"]["high"] < 0
    named = json.loads((tmp_path / "adapter" / BASE_FILE).read_text())
    assert named == outcome["dequantization"]
    config = Bundle.from_folder(
        tmp_path / "bundle", lineage=Lineage.from_dict(spec["lineage"]), licence="Apache-2.0"
    ).config
    assert torch.isfinite(load_decoder(tmp_path / "bundle", config)(Packed.of([IDS]))).all()


def test_memory_of_a_quantized_base_is_counted() -> None:
    """R-068: what the layers hold, to the byte; a seventh of a float32 base, and the base as stored while loading."""
    config = ModelConfig.from_hf(tiny_config("qwen2"))
    settings = TrainSettings(method="qlora", lora=LORA)
    decoder = _quantized()
    held = sum(value.nbytes for value in decoder.parameters())
    largest = max(module.weight.nbytes for module in decoder.modules() if isinstance(module, Nf4Linear))
    attach(decoder, LORA)
    adapted = sum(value.nbytes for value in decoder.parameters() if value.requires_grad)
    assert components(config, settings)["weights"] == held + largest + adapted
    assert components(config, settings)["loading"] == 0  # activations are larger here
    assert sum(components(config, replace(settings, sequence_tokens=8)).values()) >= 4 * config.parameters


def test_lora_settings_belong_to_both_methods_with_adapters() -> None:
    """R-006: read by lora and qlora, refused with full."""
    assert parse_settings('{"method": "qlora", "lora": {"rank": 8}}').is_adapted
    with pytest.raises(UnsupportedOption, match="no effect"):
        parse_settings('{"method": "full", "lora": {"dora": true}}')


def test_dropout_and_unadapted_layers_reach_the_frozen_path() -> None:
    """A quantized layer without an adapter, or beside dropped inputs, gives the gradient of its dequantized weight."""
    torch.manual_seed(0)
    layer = Nf4Linear(torch.nn.Linear(70, 9), Decoder(ModelConfig.from_hf(tiny_config("qwen2"))).kernels)
    x = torch.randn(4, 70, requires_grad=True)
    above = torch.randn(4, 9)
    (mine,) = torch.autograd.grad(layer(x), x, above)
    (expected,) = torch.autograd.grad(functional.linear(x, layer.weight.clone(), layer.bias), x, above)
    assert torch.equal(mine, expected)
