"""Gates: clauses about the scores of one bundle. What is missing, partial, ambiguous or of another bundle is NOT MET.

    clause := SUITE METRIC ["." ("low" | "high")] ("<" | "<=" | ">" | ">=") NUMBER
    e.g.      humaneval pass@1 >= 0.5         mbpp pass@1.low >= 0.45

`.low` and `.high` are the ends of the 95 % interval. Numbers are shares of 0 to 1. There is no "or", and no best of
several: of two reports of one suite neither counts, since the better of two runs is a figure of luck (R-094).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.evaluator.report import Report, Score
from services.evaluator.suites import find_suite
from smeltkit import limits
from smeltkit.errors import BadGate

_CLAUSE = re.compile(
    r"(?P<suite>[a-z0-9][a-z0-9_-]*)\s+(?P<metric>pass@[1-9][0-9]*)(?:\.(?P<end>low|high))?"
    r"\s*(?P<op><=|>=|<|>)\s*(?P<bound>[0-9]+(?:\.[0-9]+)?)"
)
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One comparison that a score must stand."""

    text: str
    suite: str
    metric: str
    field: str
    """"value", "low" or "high"."""
    op: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Clause:
        """The clause of `text`; BadGate shows how one is written, UnknownSuite lists the suites."""
        match = _CLAUSE.fullmatch(text.strip())
        if match is None:
            raise BadGate(
                f"clause {text!r} cannot be read; write e.g. 'humaneval pass@1 >= 0.5' or '... pass@1.low >= 0.4'"
            )
        find_suite(match["suite"])
        bound = float(match["bound"])
        if bound > 1:
            raise BadGate(
                f"clause {text!r}: {bound:g} must be a share of 0 to 1; write {bound / 100:g} for {bound:g} %"
            )
        return cls(
            text=text.strip(),
            suite=match["suite"],
            metric=match["metric"],
            field=match["end"] or "value",
            op=match["op"],
            bound=bound,
        )

    def holds(self, score: Score) -> bool:
        """Whether `score` stands the comparison."""
        measured: float = getattr(score, self.field)
        return _OPERATORS[self.op](measured, self.bound)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A clause, whether it is met, and what was measured or what is missing."""

    clause: str
    is_met: bool
    measured: str


def parse_gate(texts: Sequence[str]) -> tuple[Clause, ...]:
    """The clauses of a gate; BadGate for none, for too many, or for one that cannot be read."""
    if not 1 <= len(texts) <= limits.GATE_CLAUSES_MAX:
        raise BadGate(f"a gate has 1 to {limits.GATE_CLAUSES_MAX} clauses, not {len(texts)}")
    return tuple(Clause.parse(text) for text in texts)


def decide(clauses: Sequence[Clause], bundle: str, reports: Sequence[Report]) -> tuple[Decision, ...]:
    """Each clause decided by the one report of its suite about `bundle`; the gate is met if all are (R-009, R-095).

    Whoever asks leaves out reports that cannot be opened: what is missing is NOT MET.
    """
    return tuple(_decide(clause, bundle, reports) for clause in clauses)


def _decide(clause: Clause, bundle: str, reports: Sequence[Report]) -> Decision:
    score, problem = _find_score(clause, bundle, reports)
    if score is None:
        return Decision(clause=clause.text, is_met=False, measured=problem)
    measured = (
        f"{score.metric} {score.value:.4f} (95 % {score.low:.4f} to {score.high:.4f}, {score.passed}/{score.problems})"
    )
    if score.is_partial:
        return Decision(clause=clause.text, is_met=False, measured=f"partial, {measured}")
    return Decision(clause=clause.text, is_met=clause.holds(score), measured=measured)


def _find_score(clause: Clause, bundle: str, reports: Sequence[Report]) -> tuple[Score | None, str]:
    """The score a clause is about, or why there is none that counts."""
    of_suite = {report.digest: report for report in reports if report.suite == clause.suite}
    fitting = [report for report in of_suite.values() if report.bundle == bundle]
    if not fitting:
        return None, "the report is of another bundle" if of_suite else f"no report of {clause.suite}"
    if len(fitting) > 1:
        return None, f"{len(fitting)} reports of {clause.suite}; a gate takes one, chosen before the runs"
    if not fitting[0].has_current_suite:
        return None, f"the report was made with another version of {clause.suite}"
    score = fitting[0].score(clause.metric)
    return score, f"the report has no {clause.metric}" if score is None else ""
