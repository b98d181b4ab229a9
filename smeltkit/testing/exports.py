"""What was exported to other tools, read back by their own libraries."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a folder of TensorBoard's event files, by name: step and value."""
    loader = import_module("tensorboard.backend.event_processing.event_file_loader").EventFileLoader
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        for event in loader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found
