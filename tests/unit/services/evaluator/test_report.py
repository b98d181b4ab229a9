"""Reports: scores follow from records, whatever says otherwise is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import BUNDLE, make_report, make_sample, make_samples

from services.evaluator.report import Report, check_distinct, check_same_harness, compute_scores, open_report
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import BadManifest, ReportMismatch, SamplesNotDistinct, ScoreWithheld
from smeltkit.manifest import REFERENCE_TYPE, REPORT_TYPE, Manifest


def test_a_report_names_everything_its_score_rests_on(tmp_path: Path) -> None:
    """R-092: suite, split size, n, and a 95 % interval."""
    report = open_report(*make_report(tmp_path, 139))
    score = report.score("pass@1")
    assert score is not None
    assert (score.suite, score.passed, score.problems, score.samples, score.is_partial) == ("basic", 139, 200, 1, False)
    assert score.low < score.value < score.high
    assert report.config["verdicts"] == {"passed": 139, "wrong": 61}
    assert report.config["infra"] == 0
    assert report.bundle == BUNDLE


def _measured_with(
    report: Report, *, judge: str = "a", prompt: str = "a", temperature: float = 0, seed: int = 0
) -> Report:
    named = {"judge": {"digest": judge}, "prompt": {"digest": prompt}}
    asked = {**report.config["settings"]["requested"], "temperature": temperature, "seed": seed}
    settings = {**report.config["settings"], "requested": asked}
    provenance = {**report.config["provenance"], **named}
    return replace(report, config={**report.config, "provenance": provenance, "settings": settings})


@pytest.mark.parametrize("change", [{"judge": "b"}, {"prompt": "b"}, {"temperature": 0.8}], ids=str)
def test_no_difference_is_stated_between_two_harnesses(change: dict[str, Any], tmp_path: Path) -> None:
    """R-093: another judge, wording or way of sampling would look like a difference of the models."""
    report = open_report(*make_report(tmp_path, 139))
    check_same_harness(_measured_with(report), _measured_with(report, seed=7))
    with pytest.raises(ReportMismatch, match=f"another {next(iter(change))}"):
        check_same_harness(_measured_with(report), _measured_with(report, **change))


def test_length_ended_samples_are_counted(tmp_path: Path) -> None:
    """R-034."""
    samples = [replace(sample, finish_reason="length") for sample in make_samples(3, 1)] + make_samples(5, 2)[3:]
    report = open_report(*make_report(tmp_path, samples=samples))
    assert report.config["length_ended"] == 3
    assert report.config["finish_reasons"] == {"length": 3, "stop": 2}


def test_fewer_problems_than_the_split_make_a_partial_score(tmp_path: Path) -> None:
    report = open_report(*make_report(tmp_path, 5, problems=10))
    assert report.scores[0].is_partial


def test_a_score_with_an_infrastructure_error_is_withheld() -> None:
    """R-088: it is neither a fail nor left out."""
    samples = [*make_samples(9, 9), make_sample("P/9", "infra")]
    with pytest.raises(ScoreWithheld, match="1 of 10 verdicts are infrastructure errors"):
        compute_scores("basic", 200, samples)


def test_problems_with_other_numbers_of_samples_give_no_score() -> None:
    with pytest.raises(ReportMismatch, match="give no score"):
        compute_scores("basic", 200, [*make_samples(2, 1), make_sample("P/0", sample=1)])
    with pytest.raises(ReportMismatch, match="0 problems"):
        compute_scores("basic", 200, [])


def test_pass_at_ten_needs_ten_samples() -> None:
    samples = [make_sample("P/0", "passed" if index < 3 else "wrong", sample=index) for index in range(10)]
    scores = compute_scores("basic", 200, samples)
    assert [(score.metric, score.value) for score in scores] == [("pass@1", 0.3), ("pass@10", 1.0)]


def test_a_report_of_reference_solutions_does_not_exist(tmp_path: Path) -> None:
    """R-087: a reference record is another kind of artifact, which nothing takes for a report."""
    store = LocalStore(tmp_path)
    digest = store.put_manifest(Manifest(artifact_type=REFERENCE_TYPE, config={"passed": 200, "total": 200}))
    with pytest.raises(BadManifest, match="not a report; scores come from reports only"):
        open_report(store, digest)


def _tampered(store: LocalStore, digest: str, **changes: Any) -> str:
    manifest = store.get_manifest(digest)
    return store.put_manifest(replace(manifest, config={**manifest.config, **changes}))


def test_a_score_that_its_records_do_not_give_is_refused(tmp_path: Path) -> None:
    store, digest = make_report(tmp_path, 100)
    scores = json.loads(json.dumps(store.get_manifest(digest).config["scores"]))
    scores[0] |= {"value": 0.9, "passed": 180}
    with pytest.raises(ReportMismatch, match="other scores than its records give"):
        open_report(store, _tampered(store, digest, scores=scores))


def test_a_report_without_records_is_refused(tmp_path: Path) -> None:
    store, digest = make_report(tmp_path, 100)
    bare = store.put_manifest(replace(store.get_manifest(digest), layers=()))
    with pytest.raises(ReportMismatch, match="rest on nothing"):
        open_report(store, bare)


@pytest.mark.parametrize("change", [{"suite": {}}, {"provenance": {}}, {"suite": 7}], ids=str)
def test_a_malformed_report_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    store, digest = make_report(tmp_path)
    with pytest.raises(ReportMismatch):
        open_report(store, _tampered(store, digest, **change))


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"problem": "P/0"}\n'])
def test_malformed_records_are_refused(line: bytes, tmp_path: Path) -> None:
    store, digest = make_report(tmp_path)
    manifest = store.get_manifest(digest)
    layer = replace(manifest.layers[0], digest=store.put_bytes(line), size_bytes=len(line))
    with pytest.raises(ReportMismatch, match="malformed|no JSON"):
        open_report(store, store.put_manifest(replace(manifest, layers=(layer,))))


def test_a_report_is_an_artifact_about_its_bundle(tmp_path: Path) -> None:
    store, digest = make_report(tmp_path)
    manifest = store.get_manifest(digest)
    assert (manifest.artifact_type, manifest.subject) == (REPORT_TYPE, BUNDLE)


def test_equal_records_and_settings_give_the_same_report(tmp_path: Path) -> None:
    assert make_report(tmp_path / "a")[1] == make_report(tmp_path / "b")[1]


def test_samples_that_all_repeat_each_other_are_refused() -> None:
    """R-099: then the seeds had no effect."""
    same = [make_sample(f"P/{index // 4}", sample=index % 4) for index in range(80)]
    with pytest.raises(SamplesNotDistinct, match=r"0\.0% of further samples differ"):
        check_distinct(same)
    some = [replace(sample, reply=f"{sample.problem} {sample.sample}") for sample in same]
    assert check_distinct(some) == 1.0
    assert check_distinct(make_samples(5, 1)) is None


def test_stored_completions_may_repeat_each_other(tmp_path: Path) -> None:
    """Only seeds that had no effect are refused, and nothing was sampled here."""
    same = [make_sample(f"P/{index // 4}", sample=index % 4) for index in range(80)]
    assert open_report(*make_report(tmp_path, samples=same)).config["distinct_share"] == 0.0
