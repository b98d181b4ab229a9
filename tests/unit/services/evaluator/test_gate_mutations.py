"""Every gate closes on the fault that it guards against, and it is the gate that does: without it the fault passes.

Each case plants a fault, such as a report of another bundle, and takes one guard out of the evaluator's own source. The
original refuses the fault; the mutant, which is the evaluator with that bug, lets it pass.
"""

from __future__ import annotations

import ast
import asyncio
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from reports import BUNDLE, OTHER_BUNDLE, make_report, make_sample, make_samples

from services.evaluator import gates, harness, perplexity, references, report, settings
from services.evaluator.perplexity import Window
from services.evaluator.report import Report, open_report
from services.evaluator.suites import find_suite
from smeltkit import errors
from smeltkit.errors import Refused, SmeltError
from smeltkit.manifest import BUNDLE_TYPE

SUITE = find_suite("basic")


def _report(folder: Path, passed: int = 200, **options: Any) -> Report:
    return open_report(*make_report(folder / f"{passed}{len(options)}", passed, **options))


def _is_refused(gate: ModuleType, reports: list[Report], clause: str = "basic pass@1 >= 0.5") -> bool:
    return not all(decision.is_met for decision in gate.decide(gate.parse_gate([clause]), BUNDLE, reports))


def _raises(action: Callable[[], object]) -> bool:
    try:
        action()
    except SmeltError:
        return True
    return False


def no_report(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [])


def partial_report(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder, 9, problems=10)])


def report_of_another_bundle(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder, bundle=OTHER_BUNDLE)])


def better_of_two_runs(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder, 150), _report(folder, 10)])


def report_of_an_older_suite(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [replace(_report(folder), has_current_suite=False)])


def metric_that_was_not_measured(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder)], "basic pass@10 >= 0.5")


def luck_within_the_interval(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder, 101)], "basic pass@1.low >= 0.5")


def score_below_the_bound(gate: ModuleType, folder: Path) -> bool:
    return _is_refused(gate, [_report(folder, 99)])


def infrastructure_errors_among_the_verdicts(gate: ModuleType, folder: Path) -> bool:
    samples = [*make_samples(9, 9), make_sample("P/9", "infra")]
    return _raises(lambda: gate.compute_scores("basic", 200, samples))


def problems_with_samples_left_out(gate: ModuleType, folder: Path) -> bool:
    samples = [make_sample("P/0", "wrong"), make_sample("P/0", "wrong", sample=1), make_sample("P/1")]
    return _raises(lambda: gate.compute_scores("basic", 200, samples))


def seeds_without_effect(gate: ModuleType, folder: Path) -> bool:
    return _raises(lambda: gate.check_distinct([make_sample("P/0", sample=index) for index in range(200)]))


def report_that_boasts(gate: ModuleType, folder: Path) -> bool:
    store, digest = make_report(folder, 10)
    manifest = store.get_manifest(digest)
    scores = [{**manifest.config["scores"][0], "passed": 200, "value": 1.0}]
    return _raises(
        lambda: gate.open_report(
            store, store.put_manifest(replace(manifest, config={**manifest.config, "scores": scores}))
        )
    )


def artifact_of_another_type(gate: ModuleType, folder: Path) -> bool:
    store, digest = make_report(folder)
    return _raises(
        lambda: gate.open_report(
            store, store.put_manifest(replace(store.get_manifest(digest), artifact_type=BUNDLE_TYPE))
        )
    )


def another_judge(gate: ModuleType, folder: Path) -> bool:
    one = _report(folder)
    other = replace(one, config={**one.config, "provenance": {**one.config["provenance"], "judge": {"digest": "b"}}})
    return _raises(lambda: gate.check_same_harness(one, other))


def judge_that_fails_right_solutions(gate: ModuleType, folder: Path) -> bool:
    found = gate.References(
        suite="basic", suite_digest="", data_digest="", judge_digest="", level="", cpu="",
        passed=199, total=200, failed={"P/0": "wrong: "}, cpu_s={},
    )  # fmt: skip
    return _raises(lambda: found.check_rate(SUITE))


def references_that_were_not_all_run(gate: ModuleType, folder: Path) -> bool:
    found = gate.References(
        suite="basic", suite_digest="", data_digest="", judge_digest="", level="", cpu="",
        passed=200, total=199, failed={}, cpu_s={},
    )  # fmt: skip
    return _raises(lambda: found.check_rate(SUITE))


def engine_that_samples_otherwise(gate: ModuleType, folder: Path) -> bool:
    return _raises(lambda: gate.check_effective({"temperature": 0.0}, {"temperature": 0.7}))


def perplexity_of_164_tokens(gate: ModuleType, folder: Path) -> bool:
    return _raises(lambda: gate.check_tokens(164))


def weights_that_were_ignored(gate: ModuleType, folder: Path) -> bool:
    guessed = [Window(begin=512 * index, tokens=512, nats=512 * math.log(8000 + index)) for index in range(9)]
    return _raises(lambda: gate.check_sane(gate.perplexity_of(guessed, 9999), 8192))


def log_probability_that_is_none(gate: ModuleType, folder: Path) -> bool:
    async def score(ids: Any) -> list[float]:
        return [math.nan] * len(ids)

    async def progress(done: int, total: int) -> None:
        return None

    def work() -> object:
        return asyncio.run(gate.measure(score, range(20), window=8, stride=4, concurrency=1, progress=progress))

    return _raises(work)


def _answered(gate: ModuleType, load_ids: list[str], engine: str = "engine") -> bool:
    """Whether the harness refuses completions from these loads of the model, by this engine."""
    made = gate.Harness.__new__(gate.Harness)
    made._engine, made._loads, made._done = SimpleNamespace(digest="engine"), set(), {}
    made._batches = SimpleNamespace(used={})
    asked = SimpleNamespace(settings=dict)
    given = [
        SimpleNamespace(effective={}, engine={"digest": engine}, load_id=load_id, replica_id="one")
        for load_id in load_ids
    ]
    return _raises(lambda: [made._check(asked, completion) for completion in given])


def model_loaded_for_each_item(gate: ModuleType, folder: Path) -> bool:
    return _answered(gate, [f"load-{index}" for index in range(9)])


def engine_exchanged_on_the_way(gate: ModuleType, folder: Path) -> bool:
    return _answered(gate, ["load"], engine="another engine")


class Case(NamedTuple):
    """A fault, and the guard whose absence lets it pass."""

    fault: Callable[[ModuleType, Path], bool]
    module: ModuleType
    guard: str
    bug: str
    error: str = ""
    """The refusal, where the gate raises one."""


CASES = (
    Case(no_report, gates, "is_met=False, measured=problem", "is_met=True, measured=problem"),
    Case(partial_report, gates, "if score.is_partial:", "if False:"),
    Case(report_of_another_bundle, gates, "if report.bundle == bundle", "if True"),
    Case(better_of_two_runs, gates, "if len(fitting) > 1:", "if False:"),
    Case(report_of_an_older_suite, gates, "if not fitting[0].has_current_suite:", "if False:"),
    Case(metric_that_was_not_measured, gates, "fitting[0].score(clause.metric)", "fitting[0].scores[0]"),
    Case(luck_within_the_interval, gates, "getattr(score, self.field)", "score.value"),
    Case(score_below_the_bound, gates, "is_met=clause.holds(score)", "is_met=True"),
    Case(infrastructure_errors_among_the_verdicts, report, "if infra:", "if False:", "ScoreWithheld"),
    Case(problems_with_samples_left_out, report, "if len(sizes) != 1:", "if False:", "ReportMismatch"),
    Case(seeds_without_effect, report, "share < limits.EVALUATION_DISTINCT_MIN", "False", "SamplesNotDistinct"),
    Case(
        report_that_boasts,
        report,
        '[asdict(score) for score in scores] != config["scores"]',
        "False",
        "ReportMismatch",
    ),
    Case(
        artifact_of_another_type,
        report,
        'manifest.expect(REPORT_TYPE, JUDGEMENT_TYPE, remedy="scores come from reports only")',
        "pass",
    ),
    Case(another_judge, report, "if differ:", "if False:", "ReportMismatch"),
    Case(
        judge_that_fails_right_solutions,
        references,
        "self.passed < suite.references_passed:",
        "False:",
        "ReferenceRateTooLow",
    ),
    Case(references_that_were_not_all_run, references, "self.total != suite.problems", "False", "ReferenceRateTooLow"),
    Case(engine_that_samples_otherwise, settings, "if not is_same:", "if False:", "SettingsDiffer"),
    Case(perplexity_of_164_tokens, perplexity, "if count < limits.PERPLEXITY_TOKENS_MIN:", "if False:"),
    Case(weights_that_were_ignored, perplexity, "if not found.token.value <= bound:", "if False:", "AbsurdPerplexity"),
    Case(log_probability_that_is_none, perplexity, "not all(map(math.isfinite, counted))", "False", "ReportMismatch"),
    Case(
        model_loaded_for_each_item,
        harness,
        "if loads > limits.EVALUATION_LOADS_MAX:",
        "if False:",
        "ModelReloaded",
    ),
    Case(engine_exchanged_on_the_way, harness, 'if completion.engine["digest"] != self._engine.digest:', "if False:"),
)


def _without_guard(case: Case) -> ModuleType:
    """The module with the bug; the guard must occur in it exactly once."""
    source = Path(case.module.__file__ or "").read_text()
    assert source.count(case.guard) == 1, f"{case.guard!r} occurs {source.count(case.guard)} times"
    mutant = ModuleType(case.module.__name__)
    exec(compile(source.replace(case.guard, case.bug), "mutant", "exec"), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.__name__)
def test_the_gate_closes_on_the_fault_and_without_its_guard_would_not(case: Case, tmp_path: Path) -> None:
    """R-101: the fault is planted, the gate closes; with the bug in the gate the fault gets through."""
    (tmp_path / "gate").mkdir()
    (tmp_path / "mutant").mkdir()
    assert case.fault(case.module, tmp_path / "gate")
    assert not case.fault(_without_guard(case), tmp_path / "mutant")


def test_every_refusal_of_the_evaluator_has_a_case() -> None:
    """R-101: a gate that is added without a fault that closes it fails here."""
    raised = set()
    for path in Path(gates.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                raised.add(node.exc.func.id)
    refusals = {name for name in raised if issubclass(getattr(errors, name, Exception), Refused)}
    assert refusals == {case.error for case in CASES} - {""}


def test_mutants_leave_the_real_modules_alone() -> None:
    assert all(sys.modules[case.module.__name__] is case.module for case in CASES)
