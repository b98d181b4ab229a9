"""Decides what the next step computes: continuous batching over slots and key-value cells, without tensors or engine.

Every step takes one row of each sequence that generates and fills the rest with pieces of prompts, in turns, so that a
long prompt delays nobody. Where nobody watches the sequences that generate, prompts go first, and all of them generate
together afterwards. A prompt that begins like something already held shares those cells; one
that begins like a prompt being computed waits for it. A finished sequence's cells stay as a cache until
they are needed. When cells run out the youngest sequence gives up its own and is computed again later; nothing is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.inference.cells import CellBooks
from smeltkit.errors import PromptTooLong, TooManyRequests

PREFIX_MIN_TOKENS = 16
"""A shorter common beginning is computed again: sharing it saves less than it costs."""
PIECE_ROWS = 256
"""Rows of a prompt in its turn, at least: prompts one after the other take less time than all of them in slices."""
GROWTH_TOKENS = 16
"""Cells that admission leaves to each running sequence, so that a newcomer is not sent back at once."""
RETRY_AFTER_S = 1.0


@dataclass(eq=False, slots=True)
class Sequence:
    """One request as the scheduler sees it."""

    tokens: list[int]
    """Prompt, then what was generated."""
    limit: int
    """Length, prompt included, that it may reach."""
    all_outputs: bool = False
    """Whether every row's logits are wanted (scoring) and not only the last one's; shares no prefix then."""
    is_patient: bool = False
    """Whether nobody watches it grow, so that prompts of others may go before its next token."""
    slot: int = -1
    """Slot it holds while it runs, else -1."""
    computed: int = 0
    """Tokens whose cells its slot holds."""
    cached: int = 0
    """Tokens of the prompt that came from a shared prefix."""
    turn: int = 0
    """Last step that computed a row of it."""
    queued: int = 0
    """Step of its admission, or the last one that computed a row of it: prompts take turns in this order."""

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Share:
    """Engine operation: slot `target` takes the first `count` cells of slot `source`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Engine operation: slot `slot` keeps its first `count` cells."""

    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence in a step: `count` tokens from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """Tokens that are computed with this chunk; where that is all of them, the next one can be chosen."""
        return self.start + self.count


@dataclass(slots=True)
class Step:
    """What the engine does next: memory operations in their order, then one batch of rows, ordered by slot."""

    operations: list[Share | Cut] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the scheduler may hand out."""

    slots: int
    """Sequences held at once."""
    cells: int
    """Tokens held at once."""
    slot_cells: int
    """Tokens of one sequence at most."""
    batch_rows: int
    """Rows of a step."""
    output_rows: int
    """Rows of a step with logits; at least `slots`."""
    rows_floor: int = 1
    """Fewest rows above one worth computing together; with fewer, sequences take turns."""
    waiting_max: int = 1024
    """Sequences that may wait."""


class Scheduler:
    """Owns slots and cells. Call `plan`, carry the step out, `commit` it; then `append` or `finish` what it sampled."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.prompt_rows = bounds.batch_rows
        """Rows of prompts in a step while somebody watches others generate; its owner may change it between steps."""
        self.alone_rows = bounds.batch_rows
        """The same for a step of prompts alone."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of admission."""
        self._books = CellBooks(bounds.cells, bounds.slots)
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(bounds.slots)}
        """Free slots, least recently used first, and the tokens whose cells they still hold."""
        self._operations: list[Share | Cut] = []
        self._turn = 0
        self._is_full = False
        """Whether the head of the queue found no room and nothing was given back since."""

    @property
    def has_work(self) -> bool:
        """Whether `plan` has something to do."""
        return bool(self.running or self.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Puts `sequence` at the end of the queue; TooManyRequests if it is full, PromptTooLong if it can never run."""
        if sequence.limit > self.bounds.slot_cells:
            raise PromptTooLong(
                f"{sequence.limit} tokens do not fit into the {self.bounds.slot_cells} of this replica's"
                " key-value memory; ask for fewer or raise SMELT_INFERENCE_KV_BYTES"
            )
        if len(self.waiting) >= self.bounds.waiting_max:
            message = f"{len(self.waiting)} requests wait already; try again later"
            raise TooManyRequests(message, retry_after_s=RETRY_AFTER_S)
        self.waiting.append(sequence)

    def append(self, sequence: Sequence, token: int) -> None:
        """Adds the token chosen for `sequence`."""
        assert len(sequence.tokens) < sequence.limit
        sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Takes `sequence` out, done or cancelled, wherever it is; its slot is free for the next step."""
        self._is_full = False
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._kept[sequence.slot] = sequence.tokens[: sequence.computed]
        sequence.slot = -1

    def plan(self) -> Step:
        """The next step. Nothing is computed yet; `commit` says that it was."""
        self._admit()
        chunks = self._generating_chunks()
        prompts = [sequence for sequence in self.running if sequence.remaining > 1]
        if prompts and all(chunk.sequence.is_patient for chunk in chunks):
            chunks = self._prompt_chunks(prompts, self.alone_rows, outputs=self.bounds.output_rows)
        elif prompts:
            rows = min(self.prompt_rows, self.bounds.batch_rows - len(chunks))
            chunks += self._prompt_chunks(prompts, rows, outputs=self.bounds.output_rows - len(chunks))
        chunks = sorted(self._make_room(chunks), key=lambda chunk: chunk.sequence.slot)
        operations, self._operations = self._operations, []
        return Step(operations, chunks)

    def commit(self, step: Step) -> None:
        """Books the rows of `step` as computed."""
        self._turn += 1
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.end
            chunk.sequence.turn = chunk.sequence.queued = self._turn
            self._books.grow(chunk.sequence.slot, chunk.count)

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Moves sequences from the queue into free slots, in order; only those that wait for a prefix are passed by."""
        passed: list[Sequence] = []
        while self.waiting and self._kept and not self._is_full:
            sequence = self.waiting[0]
            source, shared = self._best_prefix(sequence)
            if self._is_prefix_coming(sequence, shared):
                passed.append(self.waiting.popleft())
                continue
            self._is_full = not self._fits(sequence, shared, source)
            if not self._is_full:
                self._place(self.waiting.popleft(), source, shared)
        self.waiting.extendleft(reversed(passed))

    def _best_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds the longest beginning of `sequence` and its length; the last token is always computed."""
        best, length = -1, 0
        if not sequence.all_outputs:
            for slot, tokens in self._slots():
                count = min(common_prefix(sequence.tokens, tokens), len(sequence.tokens) - 1)
                if count > max(length, PREFIX_MIN_TOKENS - 1):
                    best, length = slot, count
        return best, length

    def _slots(self) -> Iterator[tuple[int, list[int]]]:
        yield from self._kept.items()
        for other in self.running:
            yield other.slot, other.tokens[: other.computed]

    def _is_prefix_coming(self, sequence: Sequence, shared: int) -> bool:
        """Whether a running prompt will soon hold a longer beginning of `sequence` than `shared`."""
        return not sequence.all_outputs and any(
            other.remaining > 1
            and min(common_prefix(sequence.tokens, other.tokens), len(sequence.tokens) - 1)
            >= max(shared, other.computed) + PREFIX_MIN_TOKENS
            for other in self.running
        )

    def _fits(self, sequence: Sequence, shared: int, source: int) -> bool:
        """Whether the cells that running sequences have and still need leave enough for `sequence`."""
        if not self.running:
            return True
        busy = [other.slot for other in self.running]
        promised = sum(other.remaining + GROWTH_TOKENS for other in self.running)
        wanted = len(sequence.tokens) - (shared if source in busy else 0)
        return self._books.distinct(busy) + promised + wanted <= self.bounds.cells

    def _place(self, sequence: Sequence, source: int, shared: int) -> None:
        """Gives `sequence` a slot with its first `shared` tokens in it."""
        target = self._pick_slot(source, shared)
        self._kept.pop(target)
        if shared and target != source:
            self._cut(target, 0)
            self._books.share(source, target, shared)
            self._operations.append(Share(source, target, shared))
            if source in self._kept:
                self._kept[source] = self._kept.pop(source)
        else:
            self._cut(target, shared)
        sequence.slot, sequence.computed = target, shared
        sequence.queued = self._turn
        if not sequence.turn:
            sequence.cached = shared
        self.running.append(sequence)

    def _pick_slot(self, source: int, shared: int) -> int:
        """The free slot to use: the source itself if nothing would be lost, else one beside a running one, if there is,
        then an empty one, then the one used longest ago. Engines compute neighbours together."""
        if source in self._kept and shared == self._books.held(source):
            return source
        beside = {sequence.slot + step for sequence in self.running for step in (-1, 1)}
        others = [slot for slot in self._kept if slot != source] or [source]
        return min(others, key=lambda slot: (slot not in beside, self._books.held(slot) > 0))

    # --- rows -------------------------------------------------------------------------------------------------------

    def _generating_chunks(self) -> list[Chunk]:
        """One row of each sequence that generates; below the floor, of the one whose turn is longest ago."""
        ready = [sequence for sequence in self.running if sequence.remaining == 1]
        if 1 < len(ready) < self.bounds.rows_floor and len(ready) == len(self.running):
            ready = [min(ready, key=lambda sequence: sequence.turn)]
        return [Chunk(sequence, sequence.computed, 1) for sequence in ready]

    def _prompt_chunks(self, prompts: list[Sequence], rows: int, *, outputs: int) -> list[Chunk]:
        """Pieces of `prompts` that fill `rows` rows, with `outputs` rows of logits at most.

        Those whose turn is longest ago come first, of these the shortest; each gets its share or PIECE_ROWS.
        """
        outputs -= len(prompts)
        chunks = []
        ordered = sorted(prompts, key=lambda sequence: (sequence.queued, sequence.remaining))
        for left, sequence in zip(range(len(prompts), 0, -1), ordered, strict=True):
            count = min(sequence.remaining, max(PIECE_ROWS, -(-rows // left)), rows)
            if sequence.all_outputs:
                count = min(count, 1 + outputs)
                outputs -= max(count - 1, 0)
            rows -= count
            if count:
                chunks.append(Chunk(sequence, sequence.computed, count))
        return chunks

    def _make_room(self, chunks: list[Chunk]) -> list[Chunk]:
        """`chunks` without those of sequences that had to give up their cells for the others."""
        while self._books.free < sum(chunk.count for chunk in chunks):
            cached = next((slot for slot in self._kept if self._books.held(slot)), -1)
            if cached >= 0:
                self._kept[cached] = []
                self._cut(cached, 0)
            else:
                victim = self._preempt()
                chunks = [chunk for chunk in chunks if chunk.sequence is not victim]
        return chunks

    def _preempt(self) -> Sequence:
        """Sends the youngest running sequence back to the head of the queue, to be computed again."""
        victim = self.running.pop()
        assert self.running, "a sequence alone always fits: submit checked its limit"
        self._cut(victim.slot, 0)
        self._kept[victim.slot] = []
        victim.slot, victim.computed = -1, 0
        self.waiting.appendleft(victim)
        return victim

    def _cut(self, slot: int, count: int) -> None:
        if self._books.held(slot) > count:
            self._books.cut(slot, count)
            self._operations.append(Cut(slot, count))


def common_prefix(left: list[int], right: list[int]) -> int:
    """Number of equal tokens at the beginning of both; comparisons of whole slices, so it is fast on long lists."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
