"""Tiny models need one thread: more of them only wait for each other; and the peer of adapters."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread for torch, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def peft() -> ModuleType:
    """PEFT, loaded where a test needs it: that takes seconds, and every process collects every file."""
    return importlib.import_module("peft")
