"""What an import or a quantization would do, found out from small files and headers, before one weight byte moves."""

from __future__ import annotations

from pathlib import Path

from services.importer.convert import float_type
from services.importer.sources import Snapshot, Source
from smeltkit import limits
from smeltkit.errors import BundleIncomplete, InvalidInput, SmeltError
from smeltkit.jobs.plan import Plan
from smeltkit.manifest import Manifest
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import GGUF_FILE, WEIGHTS_MEDIA_TYPE, Bundle
from smeltkit.ml.contract import resolve_contract
from smeltkit.ml.gguf_config import check_convertible
from smeltkit.ml.licence import licence_of
from smeltkit.ml.model_files import read_json, template_of
from smeltkit.ml.quantization import SCHEMES, check_source, coverage, planned_size_bytes
from smeltkit.ml.tokenizer import Tokenizer

COVERAGE_MIN = 0.9
"""Least share of all parameters that a quantization must reach."""
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")


def plan_import(source: Source, snapshot: Snapshot, folder: Path) -> Plan:
    """The plan of an import; small files are fetched into the empty `folder`. Errors of the source are raised."""
    source.fetch(snapshot, snapshot.side_files, folder, lambda _: None)
    facts = {
        "origin": snapshot.origin,
        "files": ", ".join(snapshot.files),
        "weights_bytes": str(_weights_bytes(snapshot)),
    }
    refusals: list[SmeltError] = []
    if GGUF_FILE in snapshot.files:
        facts["architecture"] = "told by the GGUF header"
    else:
        try:
            facts |= _facts(folder)
        except InvalidInput as error:
            refusals.append(error)
    rebuild = ("rebuild config and tokenizer from metadata",) if GGUF_FILE in snapshot.files else ()
    return Plan(
        read_bytes=snapshot.size_bytes,
        write_bytes=snapshot.size_bytes,
        memory_bytes=limits.PART_BYTES * limits.PARTS_PARALLEL_MAX,
        steps=("fetch and verify files", *rebuild, "check tensors", "store bundle", "probe", "name"),
        items={**facts, "licence": licence_of(folder) or "unknown", "ignored": ", ".join(snapshot.ignored) or "none"},
        refusals=tuple(refusals),
    )


def plan_quantize(manifest: Manifest, scheme: str) -> Plan:
    """The plan of quantizing a stored bundle; every reason against it is in `refusals`."""
    bundle = Bundle.from_manifest(manifest)
    config, refusals, write_bytes, items = bundle.config, [], 0, {"source": bundle.scheme, "scheme": scheme}
    try:
        _check_change(bundle, scheme)
        if bundle.format == "safetensors":
            check_convertible(config)
        write_bytes = planned_size_bytes(config, scheme) + _beside_tensors_bytes(manifest)
        items |= {"coverage": f"{coverage(config, scheme):.1%} of the parameters take fewer than 16 bits"}
        if not SCHEMES[scheme].is_float and coverage(config, scheme) < COVERAGE_MIN:
            raise InvalidInput(f"{scheme} would reach only {coverage(config, scheme):.0%} of the parameters")
    except InvalidInput as error:
        refusals.append(error)
    largest = max(spec.elements for spec in config.tensors())
    convert = (f"convert to GGUF {float_type(bundle)}",) if bundle.format == "safetensors" else ()
    return Plan(
        read_bytes=manifest.size_bytes,
        write_bytes=write_bytes,
        memory_bytes=10 * largest + limits.PART_BYTES * limits.PARTS_PARALLEL_MAX,
        steps=(
            "fetch bundle",
            *convert,
            f"quantize to {scheme}",
            "verify types and size",
            "store bundle",
            "probe",
            "name",
        ),
        items=items,
        refusals=tuple(refusals),
    )


def _beside_tensors_bytes(manifest: Manifest) -> int:
    """Bytes of what a quantized bundle holds beside its tensors; a GGUF file repeats about all of tokenizer.json."""
    sizes = {layer.path: layer.size_bytes for layer in manifest.layers if layer.media_type != WEIGHTS_MEDIA_TYPE}
    return sum(sizes.values()) + sizes.get("tokenizer.json", 0)


def _check_change(bundle: Bundle, scheme: str) -> None:
    is_new_format = bundle.format == "safetensors" and scheme in SCHEMES and SCHEMES[scheme].is_float
    if not is_new_format or bundle.scheme not in SCHEMES:
        check_source(bundle.scheme, scheme)


def _facts(folder: Path) -> dict[str, str]:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise BundleIncomplete(
            f"the source lacks {', '.join(missing)}; a model without it cannot run as it was trained. Take the file"
            " from the place where the model is published, put it beside the weights and import again"
        )
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    tokenizer.check_fits(config.vocab_size)
    settings, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
    contract = resolve_contract(raw, generation, settings, tokenizer, chat_template=template_of(folder))
    return {
        "architecture": config.architecture,
        "parameters": str(config.parameters),
        "context_tokens": str(config.context_tokens),
        "kv_bytes_per_token": str(config.kv_bytes_per_token()),
        "task": contract.task,
        "stop_ids": ", ".join(map(str, contract.stop_ids)),
    }


def _weights_bytes(snapshot: Snapshot) -> int:
    return sum(snapshot.files[name].size_bytes for name in snapshot.weight_files)
