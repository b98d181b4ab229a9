"""Rotary position settings: read from a config.json of any age, kept in one normal form.

The normal form is a mapping with `rope_type` (linear, llama3, yarn or longrope) and every parameter resolved, so that
no reader needs a default. Formulas: Peng et al., YaRN (arXiv:2309.00071); Ding et al., LongRoPE (arXiv:2402.13753);
llama3 as in Meta's reference code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smeltkit.errors import BadModelConfig, UnsupportedArchitecture

_ORIGINAL = "original_max_position_embeddings"
_KNOWN = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {"factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor"},
    "longrope": {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
_PLACE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def number(value: Any, name: str, *, low: float = 0.0) -> float:
    """`value` as a finite float above `low`; BadModelConfig names the setting."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= low:
        raise BadModelConfig(f"config.json: {name} is {value!r}; it must be a finite number above {low:g}")
    return float(value)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings of a config.json as one mapping, from `rope_parameters` or the older `rope_scaling`."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise BadModelConfig(f"config.json: rope_scaling is a {type(found).__name__}; it must be an object")
    merged = {
        "rope_theta": config.get("rope_theta", 10000.0),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        **found,
    }
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    if _ORIGINAL in config:
        merged.setdefault(_ORIGINAL, config[_ORIGINAL])
    return merged


def normalize_scaling(config: Mapping[str, Any], *, context_tokens: int, half_rotary: int) -> dict[str, Any] | None:
    """The normal form of the rope scaling in a config.json, or None for plain rope.

    `half_rotary` is half of the rotated part of a head: the length of LongRoPE's factor lists. UnsupportedArchitecture
    for a kind, or a parameter, that the engines would not honour: an ignored rope setting gives a model that babbles.
    """
    found = rope_parameters(config)
    kind = _kind_of(found, config.get("model_type"))
    if kind == "default":
        return None
    if kind == "longrope":
        return _longrope(found, context_tokens, half_rotary)
    factor = number(found.get("factor"), "rope factor")
    rest = _llama3(found) if kind == "llama3" else _yarn(found, factor) if kind == "yarn" else {}
    return {"rope_type": kind, "factor": factor, **rest}


def _kind_of(found: Mapping[str, Any], model_type: object) -> str:
    """The kind of scaling by today's name; UnsupportedArchitecture for one, or a parameter of one, that is unknown."""
    kind: str = {"su": "longrope"}.get(found["rope_type"], found["rope_type"])
    if model_type == "phi3" and kind == "yarn":
        kind = "longrope"  # what transformers does for early Phi-3 configs
    if kind == "default":
        return kind
    if kind not in _KNOWN:
        raise UnsupportedArchitecture(f"rope scaling {kind!r} is not known; known are default, {', '.join(_KNOWN)}")
    extra = {key for key, value in found.items() if value is not None} - _KNOWN[kind] - _PLACE
    if extra - {_ORIGINAL}:
        raise UnsupportedArchitecture(f"rope scaling {kind!r} does not know {', '.join(sorted(extra))}")
    return kind


def yarn_attention_factor(factor: float) -> float:
    """YaRN's default factor on attention: 0.1 ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def llama3_frequency_factors(scaling: Mapping[str, Any], theta: float, rotary_dim: int) -> list[float]:
    """What each of the rotary_dim / 2 inverse frequencies is divided by under llama3 scaling."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling[_ORIGINAL], scaling["factor"]
    factors = []
    for index in range(0, rotary_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / rotary_dim)
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _llama3(found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (number(found.get(key), key) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise BadModelConfig("config.json: low_freq_factor must lie below high_freq_factor")
    return {"low_freq_factor": low, "high_freq_factor": high, _ORIGINAL: _original(found)}


def _yarn(found: Mapping[str, Any], factor: float) -> dict[str, Any]:
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": yarn_attention_factor(factor)}
    return {**{key: number(found.get(key) or value, key) for key, value in usual.items()}, _ORIGINAL: _original(found)}


def _original(found: Mapping[str, Any]) -> int:
    return int(number(found.get(_ORIGINAL), _ORIGINAL))


def _longrope(found: Mapping[str, Any], context_tokens: int, half_rotary: int) -> dict[str, Any]:
    original = _original(found)
    lists = {}
    for key in ("short_factor", "long_factor"):
        values = found.get(key)
        if not isinstance(values, list) or len(values) != half_rotary:
            raise BadModelConfig(f"config.json: {key} must be a list of {half_rotary} numbers")
        lists[key] = [number(value, key) for value in values]
    factor = number(found.get("factor") or context_tokens / original, "rope factor")
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    attention = number(found.get("attention_factor") or default, "attention_factor")
    return {
        "rope_type": "longrope",
        _ORIGINAL: original,
        "attention_factor": attention,
        **lists,
    }
