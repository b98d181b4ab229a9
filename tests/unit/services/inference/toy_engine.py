"""An engine that counts: the best next token is the last one plus 1. It checks what every engine relies on."""

from __future__ import annotations

import threading

import numpy as np

from services.inference.engine import EngineInfo, Logits, Rows
from smeltkit.errors import EngineUnavailable

VOCAB = 384


class CountingEngine:
    """Implements `Engine`; `gate` holds every step while it is cleared, `breaks` makes the next one fail."""

    def __init__(self, *, slots: int = 4, cells: int = 512, rows_floor: int = 1) -> None:
        self.info = EngineInfo(
            name="counting", digest="sha256:" + "0" * 64, device="none", vocab_size=VOCAB, slots=slots,
            cells=cells, slot_cells=cells, batch_rows=64, output_rows=16, rows_floor=rows_floor,
        )  # fmt: skip
        self.gate, self.breaks, self.is_closed = threading.Event(), False, False
        self.gate.set()
        self.steps: list[int] = []
        self.rests = 0
        self._held = [0] * slots

    def decode(self, rows: Rows) -> Logits:
        assert self.gate.wait(10)
        if self.breaks:
            raise EngineUnavailable("broken on purpose")
        self.steps.append(len(rows.tokens))
        outputs = []
        for token, position, slot, wanted in zip(rows.tokens, rows.positions, rows.slots, rows.outputs, strict=True):
            assert position == self._held[slot]
            self._held[slot] += 1
            if wanted:
                outputs.append(token)
        logits = np.zeros((len(outputs), VOCAB), np.float32)
        logits[np.arange(len(outputs)), [(token + 1) % 380 for token in outputs]] = 20.0
        return logits

    def share(self, source: int, target: int, count: int) -> None:
        assert self._held[target] == 0 and self._held[source] >= count
        self._held[target] = count

    def cut(self, slot: int, count: int) -> None:
        assert count <= self._held[slot]
        self._held[slot] = count

    def rest(self) -> None:
        self.rests += 1

    def close(self) -> None:
        self.is_closed = True
