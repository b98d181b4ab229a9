"""The device of a training, set up so that the same run gives the same numbers again."""

from __future__ import annotations

from typing import Final

import torch

from smeltkit.config import default_environment

_CUBLAS: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without a workspace of fixed size cuBLAS is not deterministic, and torch refuses its products."""


def prepare_device(threads: int) -> str:
    """`cuda` or `cpu`, with as many threads (0: as many as torch takes); to be called before the first operation."""
    default_environment(_CUBLAS)
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    return "cuda" if torch.cuda.is_available() else "cpu"
