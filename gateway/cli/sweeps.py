"""Sweeps: one training file, and the settings of each of its runs. Nothing here talks to anybody.

sweep:
  method: random              # or grid, which takes every combination of lists; or halving, which does either
  runs: 8                     # drawn, with seed; not of grid
  eta: 3                      # of halving only, with first_steps, see `halving`
  keys:
    learning_rate: {low: 1e-4, high: 1e-2, log: true}     # where runs are drawn
    lora.rank: [8, 16]
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.cli.training_file import merged
from smeltkit import limits
from smeltkit.errors import BadConfig

Point = dict[str, Any]
"""Dotted key to value."""
HALVING: Final = "halving"
_GRID: Final = ("method", "keys")
_RANDOM: Final = (*_GRID, "runs", "seed")
_KEYS: Final = {"grid": _GRID, "random": _RANDOM, HALVING: (*_RANDOM, "eta", "first_steps")}
_RANGE: Final = {"low", "high", "log"}


def points_of(sweep: Any) -> list[Point]:
    """The settings of every run, in order and without repetition; BadConfig names what is wrong."""
    if not isinstance(sweep, Mapping) or not isinstance(sweep.get("keys"), Mapping) or not sweep["keys"]:
        raise BadConfig("sweep must hold keys: setting (dotted where nested) to a list of values")
    method = sweep.get("method", "grid")
    if method not in _KEYS:
        raise BadConfig(f"sweep.method={method!r} must be one of {', '.join(_KEYS)}")
    if unknown := sorted(set(map(str, sweep)) - set(_KEYS[method])):
        raise BadConfig(f"sweep.{unknown[0]} has no effect with method {method}; it knows {', '.join(_KEYS[method])}")
    if "seed" in sweep and "runs" not in sweep:
        raise BadConfig("sweep.seed has no effect without runs, which it draws; remove it, or say how many")
    is_drawn = method == "random" or "runs" in sweep
    found = _random(sweep) if is_drawn else _grid(sweep["keys"])
    points = [dict(pairs) for pairs in dict.fromkeys(tuple(point.items()) for point in found)]
    if not 2 <= len(points) <= limits.SWEEP_RUNS_MAX:
        raise BadConfig(f"the sweep has {len(points)} different runs; 2 to {limits.SWEEP_RUNS_MAX} are allowed")
    return points


def run_of(value: Mapping[str, Any], point: Point, number: int) -> dict[str, Any]:
    """The training of a point: the file without its sweep, with the point's settings and a name of its own."""
    found = {key: item for key, item in value.items() if key != "sweep"}
    for key, item in point.items():
        nested: Any = item
        for part in reversed(key.split(".")):
            nested = {part: nested}
        found = merged(found, nested)
    return {**found, "name": f"{value.get('name')}-{number:02d}"}


def _grid(keys: Mapping[str, Any]) -> list[Point]:
    for key, values in keys.items():
        if not _is_list(values):
            raise BadConfig(f"sweep.keys.{key}={values!r} must be a list of values; ranges are for runs that are drawn")
    if math.prod(len(values) for values in keys.values()) > limits.SWEEP_RUNS_MAX:
        raise BadConfig(f"the grid has more than {limits.SWEEP_RUNS_MAX} runs; take fewer values, or draw some")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]


def _random(sweep: Mapping[str, Any]) -> list[Point]:
    if "runs" not in sweep:
        raise BadConfig(f"sweep.runs is missing: how many to draw, 2 to {limits.SWEEP_RUNS_MAX}")
    runs, seed = sweep["runs"], sweep.get("seed", 0)
    if not isinstance(runs, int) or not 2 <= runs <= limits.SWEEP_RUNS_MAX:
        raise BadConfig(f"sweep.runs={runs!r} must be 2 to {limits.SWEEP_RUNS_MAX}")
    if not isinstance(seed, int):
        raise BadConfig(f"sweep.seed={seed!r} must be a whole number")
    draw = random.Random(seed)
    return [{key: _drawn(key, values, draw) for key, values in sweep["keys"].items()} for _ in range(runs)]


def _drawn(key: str, values: Any, draw: random.Random) -> Any:
    """One of a list, or a number of a range, of three digits unless its bounds are whole."""
    if _is_list(values):
        return draw.choice(values)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= _RANGE:
        raise BadConfig(f"sweep.keys.{key} must be a list of values, or low, high and, if wanted, log: true")
    low, high, is_log = _number(key, values["low"]), _number(key, values["high"]), values.get("log", False)
    if not low < high or (is_log and low <= 0):
        raise BadConfig(f"sweep.keys.{key}: low={low:g} must be below high={high:g}, and above 0 where log is true")
    is_whole = low == int(low) and high == int(high)
    if is_whole and not is_log:
        return draw.randint(int(low), int(high))
    value = math.exp(draw.uniform(math.log(low), math.log(high))) if is_log else draw.uniform(low, high)
    return round(value) if is_whole else float(f"{value:.3g}")


def _number(key: str, value: Any) -> float:
    """A number; YAML reads 1e-4 as text."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadConfig(f"sweep.keys.{key}: {value!r} is no number") from error


def _is_list(values: Any) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and len(values) > 0 and all(isinstance(value, str | int | float) for value in values)
