"""Figures of the documents held against stored measurements: `python -m contracts.figures` lists those without one.

A section that names results of benchmarks, as `NAME.json` or by the command `python -m benchmarks.NAME`, may state
only what those hold: shares, times, speeds, memory and ratios, in any unit, rounded as far as it is written. A section
that names none may claim no speed and no ratio, and one that names what is not there is wrong. Pictures of output, the
level of intervals and bounds (`within 2 %`), which tests hold, are no claims of that kind.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
LEVEL: Final = ("95", "%")
"""The one share that is chosen and not measured."""
LIST_MAX: Final = 8
"""Longer lists are raw series, which no document quotes."""
_FIGURE: Final = re.compile(r"(?<![\w.,-])(?<!within )(\d[\d,]*(?:\.\d+)?) ?(x|%|times|ms|GiB|TFLOP/s|tokens/s)(?!\w)")
_NAMED: Final = re.compile(r"\b([a-z_0-9]+)\.json\b|python3? -m\s+benchmarks\.(?:gpu\.)?([a-z_0-9]+)")
_NO_RESULTS: Final = ("credentials", "dequantization", "progress", "seccomp", "stack", "tokenizer")
"""Files called .json that documents speak of and that hold no measurement."""
_FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CLAIMS: Final = ("x", "times", "tokens/s", "TFLOP/s")
"""Units that only a measurement has; others are those of limits and settings too."""
_SCALES: Final[Mapping[str, tuple[tuple[str, float], ...]]] = {
    "ms": (("_ms", 1), ("_ms_p50", 1), ("_ms_p99", 1), ("_s", 1e3), ("seconds", 1e3)),
    "GiB": (("_gib", 1), ("_mib", 2**-10), ("_bytes", 2**-30)),
    "TFLOP/s": (("flops", 1), ("flops", 1e-12)),
    "tokens/s": (("", 1),),
    "%": (("", 100), ("_percent", 1)),
}
"""Unit to the endings of names of stored numbers that can be written in it, each with its factor."""


@dataclass(frozen=True, kw_only=True)
class Unfounded:
    """A figure that nothing stored bears out, or a result that is named and not there."""

    document: str
    section: str
    figure: str

    def __str__(self) -> str:
        return f"{self.document}, {self.section!r}: {self.figure}"


def unfounded(documents: Mapping[str, str], results: Path) -> list[Unfounded]:
    """Figures in `documents`, name to text, that no result named beside them in the folder `results` holds.

    Results that are named and not there are among them, and commands without a module beside that folder.
    """
    return [
        Unfounded(document=name, section=section.partition("\n")[0].lstrip("# "), figure=figure)
        for name, text in documents.items()
        for section in re.split(r"^(?=#)", _FENCE.sub("", text), flags=re.MULTILINE)
        for figure in (*_absent(section, results), *_unfounded(section, results))
    ]


def documents_of(root: Path) -> dict[str, str]:
    """What people read: the README and everything below docs."""
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def figures_in(section: str) -> list[tuple[str, str]]:
    """Numbers with their units, as written."""
    return [found for match in _FIGURE.finditer(section) if (found := (match[1], match[2])) != LEVEL]


def _absent(section: str, results: Path) -> Iterator[str]:
    """Results that a section names and that are not stored, commands that it names and that do not exist."""
    for result, command in sorted(set(_NAMED.findall(section))):
        if result and result not in _NO_RESULTS and not (results / f"{result}.json").is_file():
            yield f"{result}.json is not stored"
        if command and not any((results.parent / folder / f"{command}.py").is_file() for folder in ("", "gpu")):
            yield f"benchmarks.{command} does not exist"


def _unfounded(section: str, results: Path) -> Iterator[str]:
    named = {f"{one or other}.json" for one, other in _NAMED.findall(section)}
    stored = [json.loads((results / name).read_text()) for name in sorted(named) if (results / name).is_file()]
    values = [value for content in stored for value in _values(content)]
    ratios = [ratio for content in stored for ratio in _ratios(content.get("rows", []))]
    for number, unit in figures_in(section):
        if not stored and unit not in _CLAIMS:
            continue
        if not any(_is_written(number, value) for value in _in_unit(unit, values, ratios)):
            yield f"{number} {unit}"


def _in_unit(unit: str, values: list[tuple[str, float]], ratios: list[float]) -> Iterator[float]:
    """What is stored, as far as it can be stated in `unit`."""
    if unit in ("x", "times"):
        yield from ratios
        yield from (power for _, value in values if value for power in (value, 1 / value))
    for ending, factor in _SCALES.get(unit, ()):
        yield from (value * factor for name, value in values if name.endswith(ending))
    if unit == "%":
        yield from (100 * abs(1 - share) for share in (*ratios, *(value for _, value in values if 0 < value < 1)))


def _is_written(number: str, value: float) -> bool:
    """Whether `value` rounds to `number`, to as many decimals as that has."""
    decimals = len(number.partition(".")[2])
    return abs(float(number.replace(",", "")) - value) <= 0.5001 * 10.0**-decimals


def _values(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every stored number with the key that it stands under."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _values(value, key)
    elif isinstance(content, list) and (len(content) <= LIST_MAX or isinstance(content[0], dict)):
        for value in content:
            yield from _values(value, name)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, float(content)


def _ratios(rows: list[dict[str, Any]]) -> Iterator[float]:
    """How the steps and memories of one case stand to each other, contender by contender."""
    for one, other in permutations(rows, 2):
        if one.get("case") == other.get("case") is not None:
            for key in ("step_ms", "peak_gib", "tokens_per_second"):
                if one.get(key) and other.get(key):
                    yield one[key] / other[key]


def main() -> int:
    """How many figures are unfounded."""
    found = unfounded(documents_of(ROOT), ROOT / "benchmarks" / "results")
    sys.stdout.write("".join(f"{one}\n" for one in found) + f"{len(found)} figures without a measurement\n")
    return len(found)


if __name__ == "__main__":
    raise SystemExit(main())
