"""Ratios against peers and floors, each measured in one run. `python -m benchmarks.NAME`, or all by `make bench`."""

from __future__ import annotations

import services.inference  # noqa: F401  says how OpenMP waits, before anything loads llama.cpp; peers inherit it
