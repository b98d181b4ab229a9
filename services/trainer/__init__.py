"""Trains bundles: plan, data, adapters, the loop, checkpoints.

The setting below must stand before torch loads OpenMP, which reads it once. Its default is to spin for milliseconds at
the end of each parallel loop: with any other process on the same cores a training step then takes many times as long.
"""

from __future__ import annotations

from smeltkit.config import default_environment

default_environment({"GOMP_SPINCOUNT": "1000"})
