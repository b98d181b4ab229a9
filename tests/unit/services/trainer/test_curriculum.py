"""Curricula: the order of stages and mixes, what of them is refused, and what is told where one follows another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import prepared_from, steps_of, write_spec
from training_runs import STAGE_STEPS, make_run

from services.trainer import train_process
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.order import Order, Share
from services.trainer.plan import plan_of
from services.trainer.settings.training import parse_settings
from services.trainer.tracking import records
from smeltkit.errors import BadConfig, BadSchedule, UnsupportedOption
from smeltkit.ids import digest_bytes

FILES = ("easy.jsonl", "code.jsonl", "easy.jsonl")
STAGES: list[dict[str, Any]] = [{"epochs": 2}, {"mix": [1, 0.5], "max_steps": 3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with two data files."""
    found = tmp_path_factory.mktemp("stages")
    prepared_from(found)
    rows = ({"text": f"{n} + {n} is {2 * n}."} for n in range(20))
    (found / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture
def as_before() -> Iterator[None]:
    """Torch as it was."""
    yield
    torch.use_deterministic_algorithms(False)


def test_an_epoch_passes_over_each_file_as_often_as_its_mix_says() -> None:
    """Whole passes take every sample, a part of one so many that are drawn anew for each epoch."""
    shares = (Share(first=0, count=10, passes=2.5), Share(first=10, count=6, passes=0.5))
    order = Order(lengths=[5] * 16, pack_tokens=10, packs_per_step=1, seed=3, shares=shares)
    taken = [Counter(number for pack in order.packs(epoch) for number in pack) for epoch in range(2)]
    for one in taken:
        assert one.total() == 28 and sorted(one[n] for n in range(10)) == [2] * 5 + [3] * 5
        assert sorted(one[n] for n in range(10, 16)) == [0] * 3 + [1] * 3
    assert taken[0] != taken[1] and order.tokens_in(order.steps_in(1)) == 28 * 5


def test_a_curriculum_is_its_stages_one_after_the_other() -> None:
    """Each epoch of the run is shuffled in its own way, also where a stage takes the same data again."""
    lengths = [4, 9, 6, 8, 3, 7]
    orders = [
        Order(lengths=lengths, pack_tokens=10, packs_per_step=1, seed=1, shares=shares, first_epoch=epoch)
        for epoch, shares in ((0, ()), (1, (Share(first=2, count=4),)), (2, ()))
    ]
    counts = [order.steps_in(1) for order in orders]
    found = Curriculum(list(zip(orders, counts, strict=True)))
    steps = [found.at(step) for step in range(found.starts[-1])]
    own = [order.at(step) for order, count in zip(orders, counts, strict=True) for step in range(count)]
    assert steps == own and steps[: counts[0]] != steps[-counts[2] :]
    assert [found.stage(step) for step in range(len(steps))] == [n for n, c in enumerate(counts) for _ in range(c)]
    assert [step for step in range(len(steps)) if found.enters(step)] == list(found.starts[1:-1])
    tokens = [sum(lengths[n] for pack in step for n in pack) for step in steps]
    assert [found.tokens_in(n) for n in range(len(steps) + 1)] == [sum(tokens[:n]) for n in range(len(steps) + 1)]
    assert sum(lengths[n] for n in found.fullest()) == max(tokens)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"stages": [{"epochs": 0}]}, BadConfig, r"stages\[0\].epochs=0 must be 1 to 1000"),
        ({"stages": [{}, {"mix": [1, 0]}]}, BadConfig, r"stages\[1\].mix\[1\]=0.0 must be 1e-06 to 1000"),
        ({"stages": [{"mix": "1"}]}, BadConfig, "list of numbers"),
        ({"stages": [{"epoch": 2}]}, BadConfig, r"did you mean stages\[0\].epochs"),
        ({"stages": [{}] * 65}, BadConfig, "65 of them; 64 at most"),
        ({"mix": [1] * 257}, BadConfig, "257 data files; 256 at most"),
        ({"stages": [{}], "epochs": 2}, UnsupportedOption, "epochs=2 has no effect beside stages"),
        ({"stages": [{}], "mix": [1]}, UnsupportedOption, "move it into them"),
    ],
)
def test_stages_that_make_no_sense_are_refused(value: dict[str, Any], error: type[Exception], says: str) -> None:
    """R-006: with the stage, the key, the value, and what is meant or allowed."""
    with pytest.raises(error, match=says):
        parse_settings(json.dumps(value))


def test_what_a_stage_cannot_reach_is_refused(folder: Path) -> None:
    """R-045: steps that its epochs do not have, too few tokens, nothing of a file; each by its stage."""
    prepared = prepared_from(
        folder, FILES[:2], stages=[{"max_steps": 99}, {"epochs": 2, "min_tokens": "1M", "max_steps": 2}]
    )
    reachable, tokens = prepared.stages[0].reachable_steps, prepared.stages[1].tokens
    assert [why.message for why in prepared.refusals] == [
        f"stages[0].max_steps=99 is out of reach: 1 epochs have {reachable} steps; lower it, or raise epochs",
        f"stages[1].min_tokens=1048576 are asked for, but {tokens} tokens are seen; lower it, or raise epochs",
    ]
    assert {type(why) for why in prepared.refusals} == {BadSchedule}
    with pytest.raises(BadSchedule, match=r"stages\[0\].mix\[1\]=0.02 takes none of the 20 samples.*raise it to 0.05"):
        prepared_from(folder, ("code.jsonl", "easy.jsonl"), stages=[{"mix": [1, 0.02]}])
    alone = prepared_from(folder, max_steps=10_000, min_tokens="1M")
    assert [why.message.partition("=")[0] for why in alone.refusals] == ["max_steps", "min_tokens"]


def test_the_plan_has_a_row_for_every_stage(folder: Path) -> None:
    """Rows, samples, tokens, steps and data by digest; a file that two stages take is read and counted once."""
    prepared = prepared_from(folder, FILES, stages=STAGES)
    easy, code = (digest_bytes((folder / name).read_bytes())[:19] for name in FILES[:2])
    items, (one, two) = plan_of(prepared, 1000).items, prepared.stages
    assert len(prepared.data) == 2 and len(prepared.samples) == 20 + len(prepared.data[1].samples)
    assert items["data 1"].startswith(f"{easy}: 20 rows, ") and items["data 2"].startswith(f"{code}: 39 rows, ")
    assert items["stage 1"] == (
        f"{easy}: 20 rows, 20 samples, {one.tokens:,} tokens in steps 1 to {one.steps}, of {one.steps} in 2 epochs"
    )
    assert items["stage 2"].startswith(
        f"{code} + {easy} x 0.5: 59 rows, {len(prepared.samples)} samples, {two.tokens:,}"
    )
    assert items["steps"] == f"{one.steps + 3} of {one.steps + two.reachable_steps} in 3 epochs"
    assert prepared.tokens == one.tokens + two.tokens == prepared.data[0].tokens * 2 + two.tokens
    assert "stage 1" not in plan_of(prepared_from(folder), 1000).items


def test_a_mix_and_its_seed_decide_what_is_trained_on(folder: Path) -> None:
    """R-077: the digest over every sample in its place is the same whenever it is made, and another for other ones."""

    def digest(**settings: Any) -> str:
        made = prepared_from(folder, FILES[:2], **{"mix": [1.5, 0.5], "seed": 4, **settings})
        samples = (made.samples[number] for step in range(made.order.starts[-1])
                   for pack in made.order.at(step) for number in pack)  # fmt: skip
        return digest_bytes(b"".join(sample.ids.tobytes() + sample.targets.tobytes() for sample in samples))

    first = digest()
    assert digest() == first
    assert len({first, digest(seed=5), digest(mix=[1.5, 0.4])}) == 3


def test_the_heldout_loss_is_measured_where_a_stage_ends(tmp_path: Path) -> None:
    """By what the steps before made of the model, and nothing of the steps after hangs on it."""
    run = make_run(tmp_path / "one", "lora")
    reports = list(run.steps())
    assert [report.stage for report in reports] == [1] * STAGE_STEPS[0] + [2] * STAGE_STEPS[1]
    measured = [report.step for report in reports if report.heldout_loss is not None]
    assert measured == [STAGE_STEPS[0] + 1]
    unmeasured = make_run(tmp_path / "other", "lora")
    unmeasured._heldout = ()
    losses = [(report.loss, report.heldout_loss) for report in unmeasured.steps()]
    assert losses == [(report.loss, None) for report in reports]


def test_a_transition_is_written_down_and_recorded(folder: Path, as_before: None) -> None:
    """The step that begins a stage tells the digests before and after, the record what each stage was."""
    heldout = {"heldout": str(folder / "easy.jsonl")}
    spec = {**write_spec(folder, "run", FILES, stages=STAGES, packs_per_step=4), **heldout}
    outcome = train_process.train(folder / "run", spec)
    steps, digests = steps_of(folder / "run"), [digest_bytes((folder / name).read_bytes()) for name in FILES]
    (entered,) = (step["entered"] for step in steps if "entered" in step)
    first = entered["step"]
    assert (entered["before"], entered["after"]) == (digests[:1], digests[1:])
    assert steps[first - 1]["entered"] == entered and steps[first - 1]["stage"] == entered["stage"] == 2
    assert entered["message"].startswith(f"stage 2 of 2 begins with step {first}: {digests[0][:19]} -> ")
    assert entered["heldout_loss"] < outcome["heldout"]["before"] and len(outcome["packing"]) == 2
    path = folder / "run" / records.METRICS_FILE
    found = records._stages(path, outcome)
    assert [(list(one["data"]), one["steps"]) for one in found] == [(digests[:1], first - 1), (digests[1:], 3)]
    assert [one["heldout_loss"] for one in found] == [entered["heldout_loss"], outcome["heldout"]["after"]]
    assert found[0]["loss"] == {"first": steps[0]["loss"], "last": steps[first - 2]["loss"]}
    assert sum(one["tokens"] for one in found) == steps[-1]["tokens"] == outcome["cost"]["tokens"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: first - 1]))
    (only,) = records._stages(path, outcome)
    assert only == {**found[0], "heldout_loss": outcome["heldout"]["after"]}, "a run that ended before its last stage"
