"""Serves bundles: continuous batching over engines, streams, scores, probes.

The setting below must stand before anything loads llama.cpp's OpenMP library, which reads it once. Its default is to
spin for milliseconds at each of the hundred barriers of a step: with any other process on the same cores a step then
takes a hundred times as long. A short spin, then sleep, costs nothing measurable on idle cores.
"""

from __future__ import annotations

from smeltkit.config import default_environment

default_environment({"GOMP_SPINCOUNT": "1000"})
