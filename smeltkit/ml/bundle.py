"""The bundle: the one value that travels. Weights with everything that is needed to run them, or no bundle at all.

    folder on disk  --Bundle.from_folder-->  Bundle  --to_config-->  manifest in the store  --from_manifest-->  Bundle

A bundle is a pure value: nothing here reads a store or the network. Its files lie in a folder of fixed names, which are
also the paths of the manifest's layers, so a stored bundle and an unpacked one are the same thing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from smeltkit.errors import BadManifest, BundleIncomplete, UnsafeFile
from smeltkit.manifest import BUNDLE_TYPE, Manifest, canonical_json
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.chat import ChatTemplate
from smeltkit.ml.contract import GenerationContract, resolve_contract
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.licence import licence_of
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.model_files import TEMPLATE_FILE, read_json, template_of
from smeltkit.ml.quantization import SCHEMES
from smeltkit.ml.safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.ml.weights import match_gguf, match_safetensors

WEIGHTS_MEDIA_TYPE: Final = "application/vnd.cncf.model.weight.v1.raw"
CONFIG_MEDIA_TYPE: Final = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_MEDIA_TYPE: Final = "application/vnd.cncf.model.doc.v1.raw"

GGUF_FILE: Final = "model.gguf"
REQUIRED_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "contract.json",
    "lineage.json",
    "LICENSE",
)
"""Files that every bundle has, beside its weights; a chat bundle also has `chat_template.jinja`."""

_OPTIONAL_FILES: Final = (TEMPLATE_FILE, "special_tokens_map.json", INDEX_FILE)
_DOC_FILES: Final = ("LICENSE", "README.md", "NOTICE")
_SHARD: Final = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a bundle is, without its bytes."""

    format: str
    """How weights are stored: `safetensors` or `gguf`."""
    scheme: str
    """Type of most weights, e.g. `BF16` or `Q4_K_M`."""
    config: ModelConfig
    """Architecture and dimensions."""
    contract: GenerationContract
    """How it generates: stop set, context, task."""
    lineage: Lineage
    """How it was made."""
    licence: str
    """SPDX expression of the weights' licence, or `LicenseRef-` and a name."""

    def __post_init__(self) -> None:
        if self.format not in ("safetensors", "gguf"):
            raise BundleIncomplete(f"bundle: format {self.format!r} is unknown; it is safetensors or gguf")
        if not self.scheme or not self.licence:
            raise BundleIncomplete(f"bundle lacks its {'licence' if self.scheme else 'quantization scheme'}")

    @classmethod
    def from_folder(cls, folder: Path, *, lineage: Lineage, licence: str | None = None) -> Bundle:
        """The bundle that the files in `folder` make up; `licence` stands in where no file declares one.

        Reads headers, not weights. BundleIncomplete names a missing part; a part that is broken or does not fit the
        others raises its own error (BadTokenizer, BadTemplate, BadModelConfig, TensorMismatch, ...).
        """
        files_of(folder)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise BundleIncomplete(f"the bundle lacks {name}; a model without it cannot run as it was trained")
        raw_config, generation = read_json(folder / "config.json"), folder / "generation_config.json"
        config = ModelConfig.from_hf(raw_config)
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        tokenizer.check_fits(config.vocab_size)
        template = template_of(folder)
        contract = resolve_contract(
            raw_config,
            read_json(generation) if generation.is_file() else None,
            read_json(folder / "tokenizer_config.json"),
            tokenizer,
            chat_template=template,
        )
        if template:
            ChatTemplate(template, contract.bos_text, contract.eos_text).render([{"role": "user", "content": "x"}])
        format, scheme = _read_weights(folder, config)
        return cls(
            format=format,
            scheme=scheme,
            config=config,
            contract=contract,
            lineage=lineage,
            licence=licence_of(folder) or licence or "",
        )

    def write_parts(self, folder: Path) -> list[Path]:
        """Writes what `from_folder` found out into `folder`, so that the bundle is complete; returns all its files.

        contract.json and lineage.json always; the template, the generation config and the licence only where no file
        holds them yet. Files are replaced, never written into: one may be a hard link into a cache.
        """
        template = template_of(folder)
        texts = {
            "contract.json": canonical_json(self.contract.to_dict()),
            "lineage.json": canonical_json(self.lineage.to_dict()),
        }
        if template is not None:
            texts[TEMPLATE_FILE] = template.encode()
        if not (folder / "generation_config.json").exists():
            texts["generation_config.json"] = canonical_json({"eos_token_id": list(self.contract.stop_ids)})
        if not (folder / "LICENSE").exists():
            texts["LICENSE"] = f"SPDX-License-Identifier: {self.licence}\n".encode()
        for name, data in texts.items():
            fresh = folder / f".{name}.new"
            fresh.write_bytes(data)
            fresh.replace(folder / name)
        return files_of(folder)

    def to_config(self) -> dict[str, Any]:
        """What a manifest says about the bundle, as plain JSON values."""
        return {
            "format": self.format,
            "scheme": self.scheme,
            "architecture": self.config.to_dict(),
            "parameters": self.config.parameters,
            "contract": self.contract.to_dict(),
            "lineage": self.lineage.to_dict(),
            "licence": self.licence,
        }

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Bundle:
        """The bundle that a stored manifest describes; BundleIncomplete or BadManifest if it is none."""
        check_complete(manifest)
        value = manifest.config
        try:
            return cls(
                format=value["format"],
                scheme=value["scheme"],
                licence=value["licence"],
                config=ModelConfig.from_dict(value["architecture"]),
                contract=GenerationContract.from_dict(value["contract"]),
                lineage=Lineage.from_dict(value["lineage"]),
            )
        except (KeyError, TypeError) as error:
            raise BadManifest(f"the manifest's bundle description is malformed: {error!r}") from error


def check_complete(manifest: Manifest) -> None:
    """Raises BundleIncomplete, naming the part, unless the manifest is a bundle with all its files."""
    manifest.expect(BUNDLE_TYPE, remedy="give a model's name or its digest")
    contract = manifest.config.get("contract")
    is_chat = isinstance(contract, Mapping) and contract.get("task") == "chat"
    paths = {layer.path for layer in manifest.layers}
    missing = [name for name in (*REQUIRED_FILES, *([TEMPLATE_FILE] if is_chat else [])) if name not in paths]
    missing += _missing_weights(paths, str(manifest.config.get("format")))
    if missing:
        raise BundleIncomplete(
            f"the bundle lacks {', '.join(missing)}; a bundle is stored whole or not at all",
            details={"missing": ",".join(missing)},
        )


def files_of(folder: Path) -> list[Path]:
    """The bundle's files in `folder`, by name; files of other names are not part of it.

    UnsafeFile names a link, which could carry another file of this machine into the store.
    """
    found = [path for path in sorted(folder.iterdir()) if _is_bundle_file(path.name)]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise UnsafeFile(f"{path.name} is not a plain file; copy the content it points at into the folder")
    return found


def media_type_of(path: str) -> str:
    """The ModelPack media type of a bundle's file; UnsafeFile for a file that no bundle has."""
    name = PurePosixPath(path).name
    if path != name or not _is_bundle_file(name):
        raise UnsafeFile(f"{path!r} is no file of a bundle; weights are safetensors or GGUF, nothing else")
    if name in _DOC_FILES:
        return DOC_MEDIA_TYPE
    return WEIGHTS_MEDIA_TYPE if name.endswith((".safetensors", ".gguf")) else CONFIG_MEDIA_TYPE


def _is_bundle_file(name: str) -> bool:
    known = (*REQUIRED_FILES, *_OPTIONAL_FILES, *_DOC_FILES, SINGLE_FILE, GGUF_FILE)
    return name in known or _SHARD.fullmatch(name) is not None


def _missing_weights(paths: set[str], format: str) -> list[str]:
    """Names of weight files that are not among `paths`."""
    if format == "gguf":
        return [] if GGUF_FILE in paths else [GGUF_FILE]
    shards = [match for path in paths if (match := _SHARD.fullmatch(path))]
    if not shards:
        return [] if SINGLE_FILE in paths else [SINGLE_FILE]
    count = int(shards[0][2])
    expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [name for name in (INDEX_FILE, *expected) if name not in paths]


def _read_weights(folder: Path, config: ModelConfig) -> tuple[str, str]:
    """Format and scheme of the weights, after every tensor was held against the architecture."""
    gguf = folder / GGUF_FILE
    if gguf.is_file():
        file = GgufFile.open(gguf)
        tensors = match_gguf(config, file)
        declared = file.metadata.get("general.file_type")
        scheme = next((name for name, rules in SCHEMES.items() if rules.file_type == declared), None)
        return "gguf", scheme or _main_type({info.name: (info.dtype, info.size_bytes) for info in tensors.values()})
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        raise BundleIncomplete(f"the bundle lacks weights: {SINGLE_FILE}, shards with {INDEX_FILE}, or {GGUF_FILE}")
    stored = match_safetensors(config, SafetensorsFolder.open(folder))
    return "safetensors", _main_type({info.name: (info.dtype, info.size_bytes) for info in stored.values()})


def _main_type(tensors: Mapping[str, tuple[str, int]]) -> str:
    """The storage type that takes most bytes."""
    sizes: Counter[str] = Counter()
    for dtype, size_bytes in tensors.values():
        sizes[dtype] += size_bytes
    return sizes.most_common(1)[0][0]
