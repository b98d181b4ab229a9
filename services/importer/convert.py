"""Folders of other forms become bundle folders: a GGUF file gets its side files, a bundle gets its weights as GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from services.importer.sources import place
from smeltkit.ml.bundle import GGUF_FILE, Bundle, files_of
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.gguf_import import gguf_to_folder

_REPLACED = ("contract.json", "lineage.json")


def complete_gguf(folder: Path) -> None:
    """Rebuilds config, tokenizer and template beside `model.gguf` from its metadata; what lay there before is replaced.

    The file's own metadata wins, because it is what the engine will obey.
    """
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    gguf_to_folder(folder / GGUF_FILE, folder)


def float_type(bundle: Bundle) -> str:
    """The float type that holds a bundle's weights without loss."""
    return bundle.scheme if bundle.scheme in ("F32", "F16") else "BF16"


def to_gguf(bundle: Bundle, source: Path, target: Path, dtype: str, progress: Callable[[int, int], None]) -> None:
    """Writes the weights of a bundle folder to the file `target` as GGUF of float type `dtype`, or links them."""
    if bundle.format == "gguf" and bundle.scheme == dtype:
        place(source / GGUF_FILE, target)
        return
    convert_to_gguf(source, target, dtype=dtype, progress=progress)


def copy_side_files(source: Path, target: Path) -> None:
    """Puts a bundle's files that hold neither weights nor history into the folder `target`."""
    for path in files_of(source):
        if path.name not in _REPLACED and ".safetensors" not in path.name and path.suffix != ".gguf":
            place(path, target / path.name)
