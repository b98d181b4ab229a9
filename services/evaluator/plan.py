"""What an evaluation would do and cost, found out without doing it; starting refuses what the plan refuses."""

from __future__ import annotations

from services.evaluator.bundles import BundleFacts
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.errors import PromptTooLong, SmeltError
from smeltkit.jobs.plan import Plan

STEPS = ("check data", "judge references", "build prompts", "load model", "generate and judge", "score", "store report")


def plan_evaluation(suite: Suite, settings: Settings, facts: BundleFacts, data_from: str, concurrency: int) -> Plan:
    """The plan of one evaluation; `data_from` says where the suite's data comes from."""
    completions = settings.problems * settings.samples
    refusals: list[SmeltError] = []
    if settings.max_tokens >= facts.context_tokens:
        refusals.append(
            PromptTooLong(
                f"max_tokens={settings.max_tokens} leaves no room for a prompt in a context of {facts.context_tokens}"
                " tokens; set a lower max_tokens"
            )
        )
    try:
        facts.check_can_take(suite)
    except SmeltError as error:
        refusals.append(error)
    return Plan(
        steps=STEPS,
        items={
            "suite": f"{suite.name} version {suite.version}, split {suite.split}",
            "problems": f"{settings.problems} of {suite.problems}"
            + (" (partial)" if _is_partial(suite, settings) else ""),
            "samples": str(settings.samples),
            "completions": str(completions),
            "new_tokens_max": str(completions * settings.max_tokens),
            "reference_runs": str(suite.problems * limits.EVALUATION_REFERENCE_RUNS),
            "concurrency": str(concurrency),
            "data": data_from,
            "scheme": facts.scheme,
        },
        refusals=tuple(refusals),
    )


def _is_partial(suite: Suite, settings: Settings) -> bool:
    return settings.problems < suite.problems
