"""Model dimensions: read from config files only, checked, and enough to list every tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import BadModelConfig, SmeltError, UnsupportedArchitecture
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig
from smeltkit.testing.tiny_models import tiny_config

ORE = Path(__file__).parents[4] / "examples" / "models" / "ore-11m"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS, ids=str)
def test_declared_tensors_are_those_that_transformers_makes(architecture: str, overrides: dict[str, Any]) -> None:
    """R-015, R-022: names and shapes, with hidden / heads != head_dim and intermediate > 4 * hidden."""
    raw = tiny_config(architecture, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    made = {name: tuple(values.shape) for name, values in model.named_parameters()}
    config = ModelConfig.from_hf(raw)
    declared = {names.canonical_to_hf(architecture, spec.name): spec.shape for spec in config.tensors()}
    assert declared == made
    assert config.parameters == model.num_parameters()


def test_shipped_model_has_its_published_size() -> None:
    """10,759,424 parameters; 5,632 bytes of cache a token."""
    config = ModelConfig.from_hf(json.loads((ORE / "config.json").read_text()))
    assert (config.parameters, config.kv_bytes_per_token()) == (10_759_424, 2 * 11 * 2 * 64 * 2)


@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS, ids=str)
def test_config_survives_its_dictionary(architecture: str, overrides: dict[str, Any]) -> None:
    """What a manifest stores is the whole config."""
    config = ModelConfig.from_hf(tiny_config(architecture, **overrides))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_head_dim_of_the_file_wins_over_hidden_by_heads() -> None:
    """R-022: IMP-24; qwen3 without the field means 128."""
    assert ModelConfig.from_hf(tiny_config("llama", head_dim=40)).head_dim == 40
    assert ModelConfig.from_hf(tiny_config("qwen3", head_dim=None)).head_dim == 128


def test_active_sliding_window_caps_the_context() -> None:
    """Full attention is exact up to the window, and not beyond."""
    assert ModelConfig.from_hf(tiny_config("phi3", sliding_window=100)).context_tokens == 100
    assert ModelConfig.from_hf(tiny_config("qwen2", sliding_window=100)).context_tokens == 256
    capped = tiny_config("qwen2", sliding_window=100, use_sliding_window=True)
    assert ModelConfig.from_hf(capped).context_tokens == 100


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 5000}, "layers"),
        ({"num_key_value_heads": 5}, "share"),
        ({"head_dim": 7}, "rotated"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
    ids=str,
)
def test_absurd_values_are_named(overrides: dict[str, Any], match: str) -> None:
    """The message has the field and the value."""
    with pytest.raises(BadModelConfig, match=match):
        ModelConfig.from_hf(tiny_config("llama", **overrides))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "None"),
        ({"model_type": "custom", "auto_map": {"AutoModel": "modeling.py"}}, "remote code"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused(overrides: dict[str, Any], match: str) -> None:
    """R-030 among them: nothing is ignored in silence."""
    with pytest.raises(UnsupportedArchitecture, match=match):
        ModelConfig.from_hf(tiny_config("llama", **overrides))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(names.TABLES)),
    st.dictionaries(
        st.sampled_from([*tiny_config("llama"), "rope_scaling", "rope_parameters"]), json_values, max_size=4
    ),
)
def test_any_json_gives_a_config_or_a_typed_error(architecture: str, overrides: dict[str, Any]) -> None:
    """Never a crash: a config.json comes from outside."""
    try:
        config = ModelConfig.from_hf({**tiny_config(architecture), **overrides})
    except SmeltError:
        return
    assert config.tensors()


def test_nobody_else_divides_hidden_by_heads() -> None:
    """R-022: one place for the default of config.json, one for that of GGUF."""
    root = Path(__file__).parents[4]
    division = re.compile(r"(hidden|n_embd|embedding)\w*[\"\])]* *// *\w*heads")
    found = [
        path
        for part in ("smeltkit", "services")
        for path in (root / part).rglob("*.py")
        if division.search(path.read_text())
    ]
    assert {path.name for path in found} == {"arch.py", "gguf_config.py"}
