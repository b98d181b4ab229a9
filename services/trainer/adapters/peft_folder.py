"""Adapter folders in PEFT's format, both ways: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT can express and this trainer does not (ranks by pattern, saved modules, biases) is refused by name. An adapter
of a quantized base comes with a third file that says which one, and goes onto no other unless that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from services.trainer.adapters.adalora import AdaloraLinear
from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import Carrier, adapters
from services.trainer.adapters.ia3 import Ia3Linear
from services.trainer.settings.ia3 import Ia3Settings
from services.trainer.settings.training import AdapterSettings, LoraSettings
from smeltkit.errors import BadFile, TensorMismatch
from smeltkit.ml import names
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import dequantization
from smeltkit.ml.decoder_weights import to_numpy, to_torch
from smeltkit.ml.model_files import read_json
from smeltkit.ml.safetensors_io import DTYPES, SafetensorsFolder, read_header, write_safetensors

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
BASE_FILE: Final = "dequantization.json"
_PREFIX: Final = "base_model.model."
_NEUTRAL: Final[dict[str, Any]] = {
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layers_to_transform": None, "layer_replication": None, "lora_bias": False,
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
}  # fmt: skip
"""Settings of PEFT and the value that each must have, since another would change what the adapter computes."""
_PARTS: Final = {
    "a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "scales": "ia3_l",
}  # fmt: skip
"""Parameters of an adapter and what PEFT calls them."""


def save_adapter(decoder: Decoder, config: AdapterSettings, folder: Path, *, base: str = "") -> list[Path]:
    """Writes the adapters of `decoder`, made under `config`, to `folder`; `base` names the model that they are for."""
    architecture = decoder.config.architecture
    rows, leaves, scaled, ranks = [], set(), set(), dict[str, int]()
    for name, layer in adapters(decoder, Carrier):
        module = names.canonical_to_hf(architecture, f"{name}.weight").removesuffix(".weight")
        if isinstance(layer, AdaloraLinear):
            ranks[module] = len(layer.folded()[0])
        leaves.add(leaf := module.rpartition(".")[2])
        scaled |= {leaf} if isinstance(layer, Ia3Linear) and layer.scales_inputs else set()
        for part, value in _stored(layer).items():
            rows.append((f"{_PREFIX}{module}.{_PARTS[part]}", "F32", to_numpy(value.detach().float().cpu())))
    declared = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": sorted(leaves),
        **_declared(config, sorted(scaled)),
        **_of_ranks(ranks),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(declared, indent=2, sort_keys=True) + "\n")
    write_safetensors(folder / WEIGHTS_FILE, rows)
    if exact := dequantization(decoder):
        (folder / BASE_FILE).write_text(json.dumps(exact, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, *((BASE_FILE,) if exact else ()))]


def load_adapter(decoder: Decoder, folder: Path, *, to_any_base: bool = False) -> AdapterSettings:
    """Attaches the adapters stored in `folder` to `decoder`; their config.

    BadFile for what this trainer cannot do, TensorMismatch for tensors missing, extra or of another shape: an adapter
    whose modules are not in the model is never half applied. TensorMismatch too if they were trained on a quantized
    base that `decoder` does not hold to the last bit, unless `to_any_base`; then the result must be evaluated anew.
    """
    _check_base(decoder, folder / BASE_FILE, to_any_base=to_any_base)
    source = SafetensorsFolder(folder=folder, tensors=read_header(folder / WEIGHTS_FILE))
    architecture, found = decoder.config.architecture, {}
    for key, info in source.tensors.items():
        part = next((part for part, ending in _PARTS.items() if key.endswith(f".{ending}")), "")
        if not key.startswith(_PREFIX) or not part or info.dtype not in DTYPES:
            raise TensorMismatch(f"{WEIGHTS_FILE}: {key!r} is no tensor of an adapter")
        module = key.removeprefix(_PREFIX).removesuffix(f".{_PARTS[part]}")
        name = names.hf_to_canonical(architecture, f"{module}.weight").removesuffix(".weight")
        found[f"{name}.{part}"] = to_torch(source.read(key), info.dtype)
    config = _config_of(read_json(folder / CONFIG_FILE, BadFile), {_target(name) for name in found})
    attach(decoder, config)
    wanted = {
        f"{name}.{part}": value for name, layer in adapters(decoder, Carrier) for part, value in _parts(layer).items()
    }
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        raise TensorMismatch(f"{WEIGHTS_FILE} and the model differ in {len(odd)} adapters, e.g. {odd[0]}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != found[name].shape:
                raise TensorMismatch(
                    f"{WEIGHTS_FILE}: {name} has shape {tuple(found[name].shape)}, not {tuple(parameter.shape)}"
                )
            parameter.copy_(found[name])
    return config


def _parts(layer: Carrier) -> dict[str, torch.Tensor]:
    """The parameters of an adapter, shaped as PEFT has them: a vector is a column, or a row if it scales inputs."""
    found = {part: value.detach() for part, value in layer.named_parameters(recurse=False)}
    if isinstance(layer, Ia3Linear):
        return {part: value.unsqueeze(0 if layer.scales_inputs else 1) for part, value in found.items()}
    return found


def _stored(layer: Carrier) -> dict[str, torch.Tensor]:
    """What is stored of an adapter: its parameters, or what is left of one whose ranks were shared out."""
    if not isinstance(layer, AdaloraLinear):
        return _parts(layer)
    return {} if layer.is_emptied else dict(zip(("a", "b"), layer.folded(), strict=True))


def _of_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What PEFT is told of modules that kept as many ranks each: plain adapters with a scale of one, on these alone."""
    kept = {module: rank for module, rank in ranks.items() if rank}
    if not kept:
        return {}
    rank = max(kept.values())
    return {"r": rank, "lora_alpha": rank, "rank_pattern": kept, "alpha_pattern": kept, "target_modules": sorted(kept)}


def _declared(config: AdapterSettings, scaled: list[str]) -> dict[str, Any]:
    """What PEFT is told of a kind of adapter, of which the modules `scaled` scale their inputs."""
    if isinstance(config, Ia3Settings):
        return {"peft_type": "IA3", "feedforward_modules": scaled, "fan_in_fan_out": False, "modules_to_save": None}
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
        "bias": "none",
    }


def _check_base(decoder: Decoder, file: Path, *, to_any_base: bool) -> None:
    if to_any_base or not file.exists():
        return
    trained, own = read_json(file, BadFile), dequantization(decoder)
    if trained != own:
        raise TensorMismatch(
            f"the adapter was trained on the base {trained}, but this one is {own or 'not quantized'};"
            " quantize the same base in the same way, or allow any base and evaluate the result anew"
        )


def _target(name: str) -> str:
    """`layers.3.attn.q.a` to `attn.q`."""
    return ".".join(name.split(".")[2:-1])


def _config_of(declared: dict[str, Any], targets: set[str]) -> AdapterSettings:
    if declared.get("peft_type") not in ("LORA", "IA3"):
        raise BadFile(f"{CONFIG_FILE}: peft_type is {declared.get('peft_type')!r}; only LORA and IA3 are supported")
    for key, neutral in _NEUTRAL.items():
        if declared.get(key) not in (neutral, None):
            raise BadFile(f"{CONFIG_FILE}: {key}={declared[key]!r} is not supported; it must be {neutral!r}")
    if declared["peft_type"] == "IA3":
        return Ia3Settings(targets=tuple(sorted(targets)))
    try:
        return LoraSettings(
            rank=int(declared["r"]),
            alpha=float(declared["lora_alpha"]),
            dropout=float(declared.get("lora_dropout", 0.0)),
            rank_stabilized=bool(declared.get("use_rslora", False)),
            dora=bool(declared.get("use_dora", False)),
            targets=tuple(sorted(targets)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{CONFIG_FILE} lacks a setting or holds one that is no number: {error!r}") from error
