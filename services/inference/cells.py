"""Exact books of key-value cells: who holds which, what is free. A cell that several slots share counts once."""

from __future__ import annotations

from collections.abc import Iterable


class CellBooks:
    """`total` cells lent to `slots` slots. Cells are numbered only to be counted; the engine has numbers of its own."""

    def __init__(self, total: int, slots: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._holders = [0] * total
        self._held: list[list[int]] = [[] for _ in range(slots)]

    @property
    def free(self) -> int:
        """Cells that no slot holds."""
        return len(self._free)

    def held(self, slot: int) -> int:
        """Cells that `slot` holds, shared ones included."""
        return len(self._held[slot])

    def distinct(self, slots: Iterable[int]) -> int:
        """Cells that at least one of `slots` holds."""
        return len({cell for slot in slots for cell in self._held[slot]})

    def grow(self, slot: int, count: int) -> None:
        """Gives `count` free cells to `slot`; there must be as many."""
        assert count <= len(self._free), f"{count} cells wanted, {len(self._free)} free"
        for _ in range(count):
            cell = self._free.pop()
            self._holders[cell] = 1
            self._held[slot].append(cell)

    def share(self, source: int, target: int, count: int) -> None:
        """Lets the empty slot `target` hold the first `count` cells of `source` too."""
        assert not self._held[target] and count <= len(self._held[source])
        shared = self._held[source][:count]
        for cell in shared:
            self._holders[cell] += 1
        self._held[target] = shared

    def cut(self, slot: int, count: int) -> None:
        """Takes all but the first `count` cells from `slot`; those that nobody else holds become free."""
        held = self._held[slot]
        for cell in held[count:]:
            self._holders[cell] -= 1
            if not self._holders[cell]:
                self._free.append(cell)
        del held[count:]
