"""The scheduler against an engine that only remembers: every row must read exactly the cells of its own sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.scheduler import Bounds, Cut, Scheduler, Sequence, Share, Step, common_prefix
from smeltkit.errors import PromptTooLong, TooManyRequests

BOUNDS = {"slots": 4, "cells": 256, "slot_cells": 256, "batch_rows": 64, "output_rows": 8}


class RecordingEngine:
    """Slots as lists of (cell, token); shared cells are the same objects, so they can be counted."""

    def __init__(self, slots: int, cells: int) -> None:
        self.cells, self._next = cells, 0
        self.slots: list[list[tuple[int, int]]] = [[] for _ in range(slots)]

    def run(self, step: Step) -> None:
        for operation in step.operations:
            if isinstance(operation, Share):
                assert not self.slots[operation.target]
                self.slots[operation.target] = self.slots[operation.source][: operation.count]
                assert len(self.slots[operation.target]) == operation.count
            else:
                del self.slots[operation.slot][operation.count :]
        for chunk in step.chunks:
            held = self.slots[chunk.sequence.slot]
            assert [token for _, token in held] == chunk.sequence.tokens[: chunk.start]
            for token in chunk.sequence.tokens[chunk.start : chunk.end]:
                held.append((self._next, token))
                self._next += 1
        assert len({cell for held in self.slots for cell, _ in held}) <= self.cells


def make(**changes: int) -> tuple[Scheduler, RecordingEngine]:
    bounds = Bounds(**{**BOUNDS, "slot_cells": changes.get("cells", 256), **changes})
    return Scheduler(bounds), RecordingEngine(bounds.slots, bounds.cells)


def advance(scheduler: Scheduler, engine: RecordingEngine) -> Step:
    """One step; every sequence that samples gets token 7, and ends at its limit."""
    step = scheduler.plan()
    engine.run(step)
    sampled = [chunk.sequence for chunk in step.chunks if chunk.end == len(chunk.sequence.tokens)]
    scheduler.commit(step)
    for sequence in sampled:
        if sequence.all_outputs or len(sequence.tokens) == sequence.limit:
            scheduler.finish(sequence)
        else:
            scheduler.append(sequence, 7)
    return step


def drain(scheduler: Scheduler, engine: RecordingEngine) -> int:
    steps = 0
    while scheduler.has_work:
        advance(scheduler, engine)
        steps += 1
        assert steps < 20_000, "the scheduler does not come to an end"
    return steps


def prompt(length: int, *, first: int = 1000) -> Sequence:
    return Sequence(list(range(first, first + length)), length + 4)


def rows(step: Step) -> dict[int, int]:
    return {chunk.sequence.tokens[0]: chunk.count for chunk in step.chunks}


requests = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 90), st.integers(0, 2), st.booleans()), max_size=14)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(1, 5), st.integers(120, 400), st.integers(1, 4), st.data())
def test_every_sequence_ends_and_every_row_reads_its_own_cells(
    wanted: list[tuple[int, int, int, bool]], slots: int, cells: int, floor: int, data: st.DataObject
) -> None:
    scheduler, engine = make(slots=slots, cells=max(cells, 211), rows_floor=floor)
    sequences = []
    for length, new, family, is_scored in wanted:
        sequence = Sequence([family] * (length // 2) + list(range(length - length // 2)), length + new, is_scored)
        scheduler.submit(sequence)
        sequences.append(sequence)
        for _ in range(data.draw(st.integers(0, 3))):
            advance(scheduler, engine)
        if data.draw(st.integers(0, 5)) == 0 and (scheduler.running or scheduler.waiting):
            victim = data.draw(st.sampled_from([*scheduler.running, *scheduler.waiting]))
            scheduler.finish(victim)
            sequences.remove(victim)
    drain(scheduler, engine)
    for sequence in sequences:
        assert sequence.slot == -1
        assert (
            sequence.computed == len(sequence.tokens) and sequence.all_outputs or len(sequence.tokens) == sequence.limit
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_a_step_never_exceeds_its_rows_and_outputs(lengths: list[int]) -> None:
    scheduler, engine = make()
    for number, length in enumerate(lengths):
        scheduler.submit(Sequence(list(range(number * 100, number * 100 + length)), length + 3, number % 3 == 0))
    while scheduler.has_work:
        step = advance(scheduler, engine)
        assert sum(chunk.count for chunk in step.chunks) <= BOUNDS["batch_rows"]
        outputs = sum(chunk.count if chunk.sequence.all_outputs else 1 for chunk in step.chunks)
        assert outputs <= BOUNDS["output_rows"]


def test_a_prompt_alone_takes_the_whole_step() -> None:
    scheduler, engine = make()
    scheduler.submit(prompt(50))
    assert rows(advance(scheduler, engine)) == {1000: 50}


def test_generating_sequences_go_on_while_a_prompt_is_computed_in_pieces() -> None:
    scheduler, engine = make()
    scheduler.prompt_rows = 32
    scheduler.submit(prompt(3))
    advance(scheduler, engine)
    scheduler.submit(prompt(60, first=5000))
    assert rows(advance(scheduler, engine)) == {1000: 1, 5000: 32}


def test_a_long_prompt_leaves_short_ones_their_turn() -> None:
    scheduler, engine = make(batch_rows=600, cells=4096, output_rows=600)
    for first, length in ((10_000, 1000), (3000, 10), (5000, 400)):
        scheduler.submit(prompt(length, first=first))
    assert rows(advance(scheduler, engine)) == {3000: 10, 5000: 295, 10_000: 295}
    assert rows(advance(scheduler, engine)) == {3000: 1, 5000: 105, 10_000: 494}


def test_prompts_are_computed_in_turns_and_not_in_slices() -> None:
    scheduler, engine = make(batch_rows=300, cells=4096)
    for first in (10_000, 20_000, 30_000):
        scheduler.submit(prompt(280, first=first))
    assert rows(advance(scheduler, engine)) == {10_000: 256, 20_000: 44}
    assert rows(advance(scheduler, engine)) == {30_000: 256, 10_000: 24, 20_000: 20}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 900), min_size=2, max_size=4), st.integers(32, 300), st.booleans())
def test_every_prompt_gets_its_turn_while_shorter_ones_keep_coming(
    lengths: list[int], batch_rows: int, is_patient: bool
) -> None:
    scheduler, engine = make(batch_rows=batch_rows, cells=4096)
    long = Sequence(list(range(100_000, 101_000)), 1004, is_patient=is_patient)
    scheduler.submit(long)
    for number in range(400):
        length = lengths[number % len(lengths)]
        scheduler.submit(
            Sequence(list(range(number * 1000, number * 1000 + length)), length + 2, is_patient=is_patient)
        )
        advance(scheduler, engine)
        if long.remaining <= 1:
            return
    raise AssertionError(f"{long.computed} of 1000 tokens after 400 steps")


def test_where_nobody_watches_prompts_go_before_the_next_tokens() -> None:
    scheduler, engine = make()
    watched, first, second = prompt(5, first=9000), prompt(5), prompt(100, first=5000)
    first.is_patient = second.is_patient = True
    scheduler.submit(first)
    advance(scheduler, engine)
    scheduler.submit(second)
    assert rows(advance(scheduler, engine)) == {5000: 64}
    scheduler.submit(watched)
    assert rows(advance(scheduler, engine)) == {9000: 5, 5000: 36}
    scheduler.submit(prompt(70, first=7000))
    assert rows(advance(scheduler, engine)) == {9000: 1, 1000: 1, 5000: 1, 7000: 61}


def test_a_common_beginning_is_shared_and_not_computed_again() -> None:
    scheduler, engine = make()
    first, second = prompt(60), Sequence(list(range(1000, 1040)) + [1, 2, 3], 50)
    scheduler.submit(first)
    advance(scheduler, engine)
    scheduler.submit(second)
    step = advance(scheduler, engine)
    assert second.cached == 40 and rows(step)[1000] in (1, 3)
    assert Share(first.slot, second.slot, 40) in step.operations


def test_samples_of_one_prompt_wait_for_the_first_and_compute_only_their_last_token() -> None:
    scheduler, engine = make()
    samples = [prompt(50) for _ in range(4)]
    for sample in samples:
        scheduler.submit(sample)
    assert sum(chunk.count for chunk in advance(scheduler, engine).chunks) == 50
    assert sum(chunk.count for chunk in advance(scheduler, engine).chunks) == 4
    assert [sample.cached for sample in samples] == [0, 49, 49, 49]


def test_cells_of_a_finished_sequence_serve_the_next_one() -> None:
    scheduler, engine = make()
    scheduler.submit(prompt(50))
    drain(scheduler, engine)
    again = prompt(50)
    scheduler.submit(again)
    assert rows(advance(scheduler, engine)) == {1000: 1}
    assert again.cached == 49


def test_a_scored_sequence_computes_every_token() -> None:
    scheduler, engine = make()
    scheduler.submit(prompt(50))
    drain(scheduler, engine)
    scored = Sequence(list(range(1000, 1050)), 50, all_outputs=True)
    scheduler.submit(scored)
    steps = drain(scheduler, engine)
    assert scored.cached == 0 and steps == 7


def test_cancel_frees_the_slot_for_the_next_step() -> None:
    scheduler, engine = make(slots=1)
    running, waiting = prompt(20), prompt(20, first=5000)
    scheduler.submit(running)
    scheduler.submit(waiting)
    assert rows(advance(scheduler, engine)) == {1000: 20}
    scheduler.finish(running)
    assert rows(advance(scheduler, engine)) == {5000: 20}


def test_a_waiting_sequence_can_be_cancelled() -> None:
    scheduler, engine = make(slots=1)
    running, waiting = prompt(20), prompt(20, first=5000)
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.finish(waiting)
    drain(scheduler, engine)
    assert waiting.computed == 0


def test_when_cells_run_out_the_youngest_is_computed_again_and_both_finish() -> None:
    scheduler, engine = make(slots=2, cells=128)
    old, young = Sequence(list(range(40)), 110), Sequence(list(range(500, 530)), 110)
    scheduler.submit(old)
    scheduler.submit(young)
    turns_back = 0
    while scheduler.has_work:
        was_running = young in scheduler.running
        advance(scheduler, engine)
        turns_back += was_running and young in scheduler.waiting
    assert turns_back >= 1
    assert len(old.tokens) == len(young.tokens) == 110


def test_a_newcomer_waits_until_its_prompt_fits_beside_the_running_ones() -> None:
    scheduler, engine = make(slots=2, cells=128)
    scheduler.submit(prompt(60))
    advance(scheduler, engine)
    scheduler.submit(prompt(60, first=5000))
    assert rows(advance(scheduler, engine)) == {1000: 1}


def test_below_the_row_floor_sequences_take_turns() -> None:
    scheduler, engine = make(rows_floor=4)
    for first in (1000, 3000):
        scheduler.submit(Sequence([first, first + 1], 20))
    advance(scheduler, engine)
    assert [list(rows(advance(scheduler, engine))) for _ in range(4)] == [[1000], [3000], [1000], [3000]]


def test_at_the_row_floor_sequences_run_together() -> None:
    scheduler, engine = make(rows_floor=4)
    for first in (1000, 2000, 3000, 4000):
        scheduler.submit(Sequence([first, first + 1], 20))
    advance(scheduler, engine)
    assert len(rows(advance(scheduler, engine))) == 4


def test_a_sequence_longer_than_all_cells_is_refused_with_the_remedy() -> None:
    scheduler, _ = make(cells=128)
    with pytest.raises(PromptTooLong, match="SMELT_INFERENCE_KV_BYTES"):
        scheduler.submit(Sequence([1], 129))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler, _ = make(waiting_max=1)
    scheduler.submit(prompt(5))
    with pytest.raises(TooManyRequests) as caught:
        scheduler.submit(prompt(5))
    assert caught.value.retry_after_s


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_common_prefix_counts_equal_leading_tokens(left: list[int], right: list[int]) -> None:
    expected = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    assert common_prefix(left, right) == expected


def test_operations_of_a_cut_slot_come_before_its_rows() -> None:
    scheduler, engine = make(slots=1)
    scheduler.submit(prompt(40))
    drain(scheduler, engine)
    scheduler.submit(prompt(20, first=5000))
    assert advance(scheduler, engine).operations == [Cut(0, 0)]
