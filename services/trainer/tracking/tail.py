"""The steps of a training as they are written by another process, and the course of its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smeltkit import limits


class Tail:
    """Reads each whole line of a file of JSON lines once; from its beginning again where it became shorter."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        """The lines that are new; empty if there is no file yet."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.split(b"\n")]


class Course:
    """The values of steps, thinned to at most COURSE_POINTS_MAX, each the mean of as many as any other; see `points`.

    A step that comes again, as all do behind a checkpoint that a run went back to, takes the place of those from it on;
    of a mean that some of them are part of the others are taken to be as it is.
    """

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._count, self._each, self._step = 0, 1, 0

    def add(self, step: int, value: float) -> None:
        """Takes in the value of a step, which follows upon the last one or upon any before it."""
        if step <= self._step:
            self._keep(max(0, self._count - (self._step - step + 1)))
        if self._count % self._each == 0:
            if len(self._sums) == limits.COURSE_POINTS_MAX:
                self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
                self._each *= 2
            self._sums.append(0.0)
        self._sums[-1] += value
        self._count += 1
        self._step = step

    def _keep(self, count: int) -> None:
        """Keeps the oldest values, that many."""
        whole, part = divmod(count, self._each)
        kept = self._sums[:whole]
        if part:
            kept.append(self.points[whole] * part)
        self._sums, self._count = kept, count
        if not count:
            self._each = 1

    @property
    def points(self) -> list[float]:
        """The means, oldest first; the last one is of the values that there are."""
        last = (self._count - 1) % self._each + 1
        means = [total / self._each for total in self._sums]
        return [*means[:-1], self._sums[-1] / last] if means else []
