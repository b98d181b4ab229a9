"""Settings of an evaluation: defaults, ranges, seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_files import make_suite

from services.evaluator.bundles import BundleFacts
from services.evaluator.config import EvaluatorConfig
from services.evaluator.plan import plan_evaluation
from services.evaluator.settings import Settings, check_effective, sample_seed
from services.evaluator.suites import find_suite
from smeltkit.errors import (
    BadConfig,
    BadManifest,
    BadRequest,
    BadSampling,
    BadTemplate,
    PromptTooLong,
    SettingsDiffer,
    SmeltError,
    UnsupportedOption,
)
from smeltkit.ids import digest_bytes
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest

SUITE = find_suite("basic")
DEFAULTS: dict[str, Any] = {"samples": 0, "temperature": 0, "top_p": 0, "seed": 0, "max_tokens": 0, "limit": 0}


def test_zero_means_the_default() -> None:
    settings = Settings.checked(SUITE, **DEFAULTS)
    assert settings.to_dict() == {
        "samples": 1,
        "temperature": 0,
        "top_p": 1.0,
        "seed": 0,
        "max_tokens": 512,
        "problems": 200,
    }


def test_a_bundle_that_reasons_gets_the_suites_room_for_it_unless_told_otherwise() -> None:
    """R-039: the budget is the answer's and the declared one for reasoning."""
    assert Settings.checked(SUITE, **DEFAULTS, has_thinking=True).max_tokens == SUITE.max_tokens + SUITE.thinking_tokens
    asked = {**DEFAULTS, "max_tokens": 100}
    assert Settings.checked(SUITE, **asked, has_thinking=True).max_tokens == 100
    assert not BundleFacts.from_manifest(_manifest()).has_thinking
    assert BundleFacts.from_manifest(_manifest(thinking=["[[", "]]"])).has_thinking


def test_a_float32_of_the_wire_is_recorded_as_it_was_meant() -> None:
    settings = Settings.checked(SUITE, **{**DEFAULTS, "temperature": 0.800000011920929, "samples": 10})
    assert settings.temperature == 0.8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": -1}, BadRequest, "samples=-1 must be 0 to 1000"),
        ({"samples": 1001}, BadRequest, "samples=1001 must be 0 to 1000"),
        ({"samples": 2}, BadRequest, "samples=2 with temperature 0"),
        ({"temperature": -0.1}, BadSampling, "temperature=-0.1 must be 0 (greedy) or 0.01 to 10"),
        ({"temperature": 1e9}, BadSampling, "must be 0 (greedy) or 0.01 to 10"),
        ({"temperature": float("nan")}, BadSampling, "temperature=nan"),
        ({"temperature": 1, "top_p": 1.1}, BadSampling, "top_p=1.1 must be above 0"),
        ({"top_p": 0.9}, UnsupportedOption, "top_p=0.9 has no effect at temperature 0"),
        ({"max_tokens": -1}, BadRequest, "max_tokens=-1 must be 0 to 32768"),
        ({"limit": 201}, BadRequest, "limit=201 must be 0 to 200"),
        ({"samples": 300, "temperature": 1}, BadRequest, "samples * problems=60000 must be 0 to 50000"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(change: dict[str, Any], error: type[SmeltError], message: str) -> None:
    with pytest.raises(error) as caught:
        Settings.checked(SUITE, **{**DEFAULTS, **change})
    assert message in str(caught.value)


def test_a_seed_depends_on_seed_problem_and_sample_alone() -> None:
    seeds = {sample_seed(seed, problem, sample) for seed in (0, 1) for problem in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sample_seed(0, "HumanEval/0", 0) == sample_seed(0, "HumanEval/0", 0)


@pytest.mark.parametrize(("requested", "effective"), [({"a": 1}, {}), ({"a": 1}, {"a": 2}), ({"a": 0.5}, {"a": 0.51})])
def test_a_setting_that_was_not_in_force_is_named(requested: dict[str, Any], effective: dict[str, Any]) -> None:
    """R-007."""
    with pytest.raises(SettingsDiffer, match="a=.* was requested"):
        check_effective(requested, effective)
    check_effective(requested, requested)


def _manifest(*, thinking: list[str] | None = None, parts: tuple[str, ...] = ("tokenizer.json",)) -> Manifest:
    layers = tuple(
        Descriptor(media_type="x", digest=digest_bytes(path.encode()), size_bytes=1, path=path) for path in parts
    )
    contract = {"context_tokens": 1024, "thinking": thinking}
    return Manifest(artifact_type=BUNDLE_TYPE, config={"scheme": "BF16", "contract": contract}, layers=layers)


def test_a_bundles_own_thinking_markers_are_used() -> None:
    assert BundleFacts.from_manifest(_manifest()).thinking == ("<think>", "</think>")
    assert BundleFacts.from_manifest(_manifest(thinking=["[[", "]]"])).thinking == ("[[", "]]")


@pytest.mark.parametrize("config", [{}, {"contract": 7}, {"contract": {}}], ids=str)
def test_a_malformed_bundle_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BadManifest, match="malformed"):
        BundleFacts.from_manifest(Manifest(artifact_type=BUNDLE_TYPE, config=config))


def test_the_plan_says_what_it_costs() -> None:
    """EVL-37."""
    facts = BundleFacts.from_manifest(_manifest())
    settings = Settings.checked(SUITE, **{**DEFAULTS, "samples": 4, "temperature": 0.8, "limit": 50})
    plan = plan_evaluation(SUITE, settings, facts, "store", 8)
    assert plan.items["problems"] == "50 of 200 (partial)"
    assert (plan.items["completions"], plan.items["new_tokens_max"]) == ("200", "102400")
    assert plan.items["reference_runs"] == "600"
    plan.check()


def test_the_plan_refuses_what_can_not_work() -> None:
    facts = BundleFacts.from_manifest(_manifest())
    settings = Settings.checked(SUITE, **{**DEFAULTS, "max_tokens": 1024})
    with pytest.raises(PromptTooLong, match="max_tokens=1024 leaves no room for a prompt in a context of 1024"):
        plan_evaluation(SUITE, settings, facts, "store", 8).check()
    chat = find_suite("mbpp")
    with pytest.raises(BadTemplate, match="mbpp asks by chat, but the bundle has no chat template"):
        plan_evaluation(chat, Settings.checked(chat, **DEFAULTS), facts, "store", 8).check()


@pytest.mark.parametrize(
    "change", [{"inference_address": "here"}, {"sandbox_address": ""}, {"concurrency": 0}, {"slots": 65}], ids=str
)
def test_a_bad_configuration_names_the_setting(change: dict[str, Any]) -> None:
    values: dict[str, Any] = {"inference_address": "h:1", "sandbox_address": "h:2"}
    EvaluatorConfig(**values)
    with pytest.raises(BadConfig, match=next(iter(change))):
        EvaluatorConfig(**{**values, **change})


def test_concurrency_is_no_part_of_a_result(tmp_path: Path) -> None:
    """Settings name what a sample depends on; how many run at once is none of it."""
    assert "concurrency" not in Settings.checked(make_suite(tmp_path)[0], **DEFAULTS).to_dict()
