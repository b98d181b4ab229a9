"""A model's files looked at where they lie: what the platform would refuse is not worth sending."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from smeltkit.errors import BadFile
from smeltkit.ml import safetensors_io
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.model_files import read_json


def check_source(paths: Iterable[Path]) -> None:
    """Reads the headers of weight files and the small JSON files among `paths`.

    BadSafetensors, BadGguf or BadModelConfig name the file and the remedy; UnsupportedArchitecture what is supported.
    """
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                safetensors_io.read_header(path)
            elif path.suffix == ".gguf":
                GgufFile.open(path)
            elif path.name == "config.json":
                ModelConfig.from_hf(read_json(path))
            elif path.suffix == ".json" and path.name != "tokenizer.json":
                read_json(path)
        except BadFile as error:
            message = f"{error.message}; nothing was sent. Fetch or copy the file again, and compare its checksum"
            raise type(error)(message, details={**error.details, "file": path.name}) from error
