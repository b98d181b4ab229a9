"""Weight files looked at where they lie: a header that breaks its format, or a file cut short, is not worth sending."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from smeltkit.errors import BadFile
from smeltkit.ml import safetensors_io
from smeltkit.ml.gguf_io import GgufFile


def check_weights(paths: Iterable[Path]) -> None:
    """Reads the headers of the weight files among `paths`; BadSafetensors or BadGguf name the file and the remedy."""
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                safetensors_io.read_header(path)
            elif path.suffix == ".gguf":
                GgufFile.open(path)
        except BadFile as error:
            message = f"{error.message}; nothing was sent. Fetch or copy the file again, and compare its checksum"
            raise type(error)(message, details={**error.details, "file": path.name}) from error
