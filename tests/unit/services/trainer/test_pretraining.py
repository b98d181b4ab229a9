"""Pre-training: from random weights of a shape, equal to a loop written out in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from services.trainer.costs.forecast import Pace
from services.trainer.costs.paces import Paces
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.samples import Sample
from services.trainer.plan import Prepared, plan_of, prepare
from services.trainer.run.fresh import fresh_decoder
from services.trainer.run.loop import Run
from services.trainer.settings.training import parse_settings
from services.trainer.shape import shaped_config
from services.trainer.train_process import train
from smeltkit.errors import BadConfig, BadDataset, BadModelConfig, UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.decoder_weights import load_decoder
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import write_tiny_model

SHAPE = {"layers": 2, "hidden_size": 32, "intermediate_size": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
SETTINGS: dict[str, Any] = {
    "method": "pretrain", "init": "random", "shape": SHAPE, "epochs": 3, "sequence_tokens": 64, "packs_per_step": 2,
    "learning_rate": "3e-3", "clip_norm": 0.5, "seed": 7,
}  # fmt: skip


def _prepared(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Prepared:
    write_tiny_model(folder / "base", "qwen2")
    texts = [{"text": f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 3)} for n in range(24)]
    data = folder / "code.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or texts))
    bundle = Bundle.from_folder(
        folder / "base", lineage=Lineage(operation="import", code_revision="test"), licence="Apache-2.0"
    )
    return prepare(folder / "base", bundle, [data], None, parse_settings(json.dumps({**SETTINGS, **settings})))


def _fresh(prepared: Prepared) -> Decoder:
    return fresh_decoder(prepared.config, seed=prepared.settings.seed, dtype=torch.float32, device="cpu")


def _plain_loss(decoder: Decoder, sample: Sample) -> torch.Tensor:
    """Summed cross-entropy of one sample alone, through its logits."""
    logits = decoder(Packed.of([sample.ids.tolist()]))
    targets = torch.from_numpy(sample.targets).to(torch.int64)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def test_pretraining_equals_a_plain_torch_loop(tmp_path: Path) -> None:
    """Same batches, sample by sample, torch's own loss, clipping and AdamW: the same losses, and they fall."""
    prepared = _prepared(tmp_path)
    settings, samples = prepared.settings, prepared.samples
    losses: list[float] = []
    run = Run(
        _fresh(prepared), samples, prepared.order, prepared.schedule, settings,
        folder=tmp_path / "checkpoints", run_digest="sha256:" + "0" * 64, peak=PeakMemory("cpu"),
    )  # fmt: skip
    run.run(lambda report: losses.append(report.loss))
    plain, expected = _fresh(prepared), []
    adam = torch.optim.AdamW(plain.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(prepared.schedule.total_steps):
        batch = [samples[number] for pack in prepared.order.at(step) for number in pack]
        loss = torch.stack([_plain_loss(plain, sample) for sample in batch]).sum() / sum(s.counted for s in batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip_norm)
        adam.param_groups[0]["lr"] = prepared.schedule.rate(step)
        adam.step()
        adam.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) > 5
    assert losses[-1] < 0.7 * losses[0]


def test_the_result_is_a_bundle_of_the_new_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's whole work: trained weights, a config of their shape, the base's tokenizer; cost and forecast."""
    prepared = _prepared(tmp_path)
    monkeypatch.setattr(Paces, "of", lambda self, prepared: Pace(step_s=0.1, step_tokens=100, memory_bytes=1 << 20))
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda flag: None)
    spec = {
        "settings": {**SETTINGS, "max_steps": 2}, "base": str(tmp_path / "base"), "heldout": "",
        "data": [str(tmp_path / "code.jsonl")], "lineage": prepared.bundle.lineage.to_dict(),
        "licence": "Apache-2.0", "threads": 1,
        "paces": str(tmp_path), "run_digest": "sha256:" + "0" * 64,
    }  # fmt: skip
    outcome = train(tmp_path, spec)
    assert outcome["cost"]["tokens"] == outcome["forecast"]["tokens"] == prepared.order.tokens_in(2)
    found = Bundle.from_folder(tmp_path / "bundle", lineage=prepared.bundle.lineage, licence="Apache-2.0")
    assert found.config == prepared.config != prepared.bundle.config
    assert load_decoder(tmp_path / "bundle", found.config).config.layers == 2


def test_the_plan_tells_shape_and_tokens(tmp_path: Path) -> None:
    """Random weights of another shape than the base's: counted before one is drawn."""
    prepared = _prepared(tmp_path)
    items = plan_of(prepared, 1000).items
    assert prepared.config.layers == 2 and prepared.config.hidden_size == 32
    assert items["trainable"].startswith(f"{sum(p.numel() for p in _fresh(prepared).parameters()):,} of ")
    assert items["tokens a parameter"].startswith(f"{prepared.data[0].tokens * 3 / prepared.config.parameters:.2f}")
    assert prepared.tokens == prepared.data[0].tokens * 3


def test_a_seed_means_the_same_weights() -> None:
    """Deviation as documented, norms one, biases zero."""
    config = ModelConfig.from_hf({
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 500, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
    })  # fmt: skip
    one, same, other = (
        fresh_decoder(config, seed=seed, dtype=torch.float32, device="cpu").state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert one["embed.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert one["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert one["norm.weight"].eq(1).all() and one["layers.0.attn.q.bias"].eq(0).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [({"method": "full"}, UnsupportedOption, "init='random' has no effect with method full"),
     ({"init": "base"}, UnsupportedOption, "shape has no effect with the weights of the base"),
     ({"shape": {"layer": 2}}, BadConfig, "did you mean shape.layers"),
     ({"shape": {**SHAPE, "kv_heads": 3}}, BadModelConfig, "4 heads cannot share 3"),
     ({"lora": {"rank": 4}}, UnsupportedOption, "no effect with method pretrain")],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _prepared(tmp_path, **settings)


def test_a_conversation_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="row 1 holds no text"):
        _prepared(tmp_path, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])


def test_another_number_of_layers_drops_what_is_said_of_each(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["full_attention"] * 9}))
    settings = parse_settings(json.dumps({"method": "pretrain", "init": "random", "shape": {"layers": 3}}))
    found = shaped_config(tmp_path, settings.shape)
    assert found["num_hidden_layers"] == 3 and "layer_types" not in found
