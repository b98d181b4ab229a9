"""Which other tools hear of a training: declared in its file. Where they are is said by whoever runs the trainer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from smeltkit.errors import BadConfig

_EXPERIMENT: Final = re.compile(r"[\w .:/-]{0,128}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Tools that get every step of a run."""

    tensorboard: bool = False
    """Whether event files are written."""
    mlflow: str = ""
    """Name of the MLflow experiment that gets a run; empty for none."""

    def __post_init__(self) -> None:
        if not _EXPERIMENT.fullmatch(self.mlflow):
            raise BadConfig(
                f"export.mlflow={self.mlflow!r} must be up to 128 letters, digits, spaces and any of . _ : / -"
            )
