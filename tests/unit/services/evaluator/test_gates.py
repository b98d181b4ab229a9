"""Gates: each test injects one bug of the past by name, and the gate must not be met."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import BUNDLE, OTHER_BUNDLE, make_report

from services.evaluator.gates import Clause, Decision, decide, parse_gate
from services.evaluator.report import Report, open_report
from smeltkit.errors import BadGate, UnknownSuite


def _report(folder: Path, passed: int, **options: object) -> Report:
    return open_report(*make_report(folder / f"{passed}-{options}".replace("/", ""), passed, **options))  # type: ignore[arg-type]


def _is_met(clauses: list[str], reports: list[Report], bundle: str = BUNDLE) -> bool:
    decisions = decide(parse_gate(clauses), bundle, reports)
    assert len(decisions) == len(clauses)
    return all(decision.is_met for decision in decisions)


@pytest.mark.parametrize(
    ("clause", "is_met"),
    [
        ("basic pass@1 >= 0.5", True),
        ("basic pass@1 > 0.5", False),
        ("basic pass@1 <= 0.5", True),
        ("basic pass@1 < 0.5", False),
        ("basic pass@1.low >= 0.4", True),
        ("basic pass@1.low >= 0.5", False),
        ("basic pass@1.high <= 0.6", True),
        ("  basic   pass@1>=.5".replace(">=.5", ">= 0.5"), True),
    ],
)
def test_a_clause_compares_what_it_says(clause: str, is_met: bool, tmp_path: Path) -> None:
    assert _is_met([clause], [_report(tmp_path, 100)]) is is_met


def test_every_clause_must_hold(tmp_path: Path) -> None:
    report = _report(tmp_path, 100)
    assert _is_met(["basic pass@1 >= 0.5", "basic pass@1.high < 0.6"], [report])
    assert not _is_met(["basic pass@1 >= 0.5", "basic pass@1.high < 0.5"], [report])


def test_bug_missing_input_counted_as_met(tmp_path: Path) -> None:
    """R-009."""
    (first, second) = decide(
        parse_gate(["basic pass@1 >= 0.1", "humaneval pass@1 >= 0.1"]), BUNDLE, [_report(tmp_path, 200)]
    )
    assert first.is_met
    assert second == Decision(clause="humaneval pass@1 >= 0.1", is_met=False, measured="no report of humaneval")


def test_bug_clauses_of_one_gate_met_by_two_models(tmp_path: Path) -> None:
    """R-095: one model is good at one suite, another at the other."""
    reports = [_report(tmp_path, 200), _report(tmp_path, 164, suite="humaneval", bundle=OTHER_BUNDLE)]
    clauses = ["basic pass@1 >= 0.9", "humaneval pass@1 >= 0.9"]
    assert not _is_met(clauses, reports, BUNDLE)
    assert not _is_met(clauses, reports, OTHER_BUNDLE)


def test_bug_best_of_several_runs(tmp_path: Path) -> None:
    """R-094."""
    reports = [_report(tmp_path, 199), _report(tmp_path, 100)]
    assert not _is_met(["basic pass@1 >= 0.9"], reports)
    assert not _is_met(["basic pass@1 >= 0.1"], reports)
    assert _is_met(["basic pass@1 >= 0.9"], [reports[0], reports[0]])


def test_bug_score_of_a_few_problems(tmp_path: Path) -> None:
    (decision,) = decide(parse_gate(["basic pass@1 >= 0.9"]), BUNDLE, [_report(tmp_path, 10, problems=10)])
    assert not decision.is_met
    assert decision.measured.startswith("partial, pass@1 1.0000")


def test_bug_metric_that_was_not_measured(tmp_path: Path) -> None:
    """R-094: pass@10 of one sample a problem does not exist, and pass@1 does not stand in for it."""
    assert not _is_met(["basic pass@10 >= 0.1"], [_report(tmp_path, 200)])


def test_bug_report_of_another_version_of_the_suite(tmp_path: Path) -> None:
    report = replace(_report(tmp_path, 200), has_current_suite=False)
    assert not _is_met(["basic pass@1 >= 0.1"], [report])


def test_bug_gate_without_clauses_is_met() -> None:
    """R-008."""
    with pytest.raises(BadGate, match="1 to 64 clauses, not 0"):
        parse_gate([])
    with pytest.raises(BadGate, match="not 65"):
        parse_gate(["basic pass@1 >= 0.1"] * 65)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "basic",
        "basic pass@1",
        "basic pass@1 = 0.5",
        "basic pass@0 >= 0.5",
        "basic oracle >= 0.5",
        "basic best >= 0.5",
        "basic pass@1.mean >= 0.5",
        "basic pass@1 >= -0.5",
        "basic pass@1 >= 50%",
        "basic pass@1 >= 0.5 or humaneval pass@1 >= 0.5",
        "basic pass@1 >= nan",
    ],
)
def test_a_clause_outside_of_the_grammar_is_refused(text: str) -> None:
    """R-094: there is no word for an oracle, a best of several, or an alternative."""
    with pytest.raises(BadGate, match="cannot be read"):
        parse_gate([text])


def test_a_percentage_is_answered_with_the_share() -> None:
    with pytest.raises(BadGate, match=r"write 0\.82 for 82 %"):
        parse_gate(["humaneval pass@1 >= 82"])


def test_an_unknown_suite_is_an_error_and_not_a_missing_report() -> None:
    with pytest.raises(UnknownSuite):
        parse_gate(["humanevil pass@1 >= 0.5"])


@given(st.text(max_size=40))
def test_any_text_is_a_clause_or_refused(text: str) -> None:
    try:
        clause = Clause.parse(text)
    except (BadGate, UnknownSuite):
        return
    assert 0 <= clause.bound <= 1
