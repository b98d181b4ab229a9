"""How a recipe runs: what depends on what, what is found, what is skipped; against services that answer at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from gateway.cli.output import Output
from gateway.recipes.argo import Pods, retried_codes, workflow
from gateway.recipes.plan import outlooks, pinned, request_of
from gateway.recipes.run import Outcome, run_recipe
from gateway.recipes.schema import Recipe
from smeltkit.errors import (
    BadConfig,
    BadRequest,
    GateFailed,
    QuotaUsedUp,
    StoreUnavailable,
    UnknownArtifact,
    UnknownSource,
)
from smeltkit.ids import digest_bytes

STAGES = {
    "small": {"quantize": {"ref": "old", "scheme": "Q8_0", "name": "new:q8"}},
    "first": {"eval": {"ref": "old", "suite": "basic"}},
    "second": {"eval": {"ref": {"stage": "small"}, "suite": "basic"}},
    "better": {
        "compare": {"baseline": {"stage": "first"}, "candidate": {"stage": "second"}, "must": "better"},
    },
    "never": {"quantize": {"ref": {"stage": "small"}, "scheme": "Q4_0", "name": "new:q4"}, "after": ["better"]},
    "other": {"quantize": {"ref": {"stage": "small"}, "scheme": "F16", "name": "new:f16"}},
}
RECIPE = Recipe.of({"recipe": "tiny", "stages": STAGES}, Path("folder/tiny.yaml"))
PODS = Pods(image="gateway:1")


class Services(SimpleNamespace):
    """A session: a method is its name, and a job of a request is over with a digest that follows from the request."""

    def __init__(self, **answers: Callable[[Any], Any]) -> None:
        names = ("artifacts", "jobs", "importer", "evaluator", "trainer")
        super().__init__(output=Output(), **dict.fromkeys(names, _Names()), started=[], listed=[], answers=answers)

    async def artifact(self, reference: str) -> artifact_pb2.Artifact:
        return artifact_pb2.Artifact(digest=digest_bytes(reference.encode()))

    async def call(self, method: str, request: Any, **_: Any) -> Any:
        if method in self.answers:
            return self.answers[method](request)
        if method == "ListJobs":
            return job_pb2.ListJobsResponse(jobs=self.listed)
        if method == "Compare":
            return evaluator_pb2.CompareResponse(verdict="no difference shown")
        if method.startswith("Plan"):
            return SimpleNamespace(plan=job_pb2.Plan())
        assert method.startswith("Start"), method
        self.started.append(request.spec)
        return SimpleNamespace(job=_done(request.spec))


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


def _done(spec: Any, state: str = "SUCCEEDED", **fields: Any) -> job_pb2.Job:
    """The job of a request, over."""
    digest = digest_bytes(spec.SerializeToString(deterministic=True))
    return job_pb2.Job(id="job-1", state=job_pb2.JobState.Value(f"JOB_STATE_{state}"), result_digest=digest, **fields)


def states(outcomes: list[Outcome]) -> Mapping[str, str]:
    """How each stage ended."""
    return {one.stage.name: one.state for one in outcomes}


async def test_an_unmet_demand_holds_up_what_depends_on_it_and_nothing_else() -> None:
    """R-105: what needs a failed stage is skipped, all others come to their end; every edge is a digest."""
    session: Any = Services()
    found = await run_recipe(session, RECIPE)
    assert states(found) == {"small": "succeeded", "first": "succeeded", "second": "succeeded", "better": "failed",
                             "never": "skipped", "other": "succeeded"}  # fmt: skip
    by_name = {one.stage.name: one for one in found}
    assert by_name["second"].inputs == {"ref": (by_name["small"].digest,)}
    assert isinstance(by_name["better"].error, GateFailed) and by_name["better"].error.exit_code == 1
    assert "it needs better, which did not succeed" in by_name["never"].line()
    assert len(session.started) == 4 and not by_name["never"].inputs


async def test_a_stage_that_is_refused_ends_with_its_own_error() -> None:
    def refused(request: Any) -> Any:
        raise StoreUnavailable("no store")

    found = {one.stage.name: one for one in await run_recipe(Services(StartQuantize=refused), RECIPE)}  # type: ignore[arg-type]
    assert isinstance(found["small"].error, StoreUnavailable) and found["first"].state == "succeeded"
    assert {found[name].state for name in ("second", "better", "never", "other")} == {"skipped"}


async def test_a_job_of_the_same_request_that_still_works_is_followed_and_not_started_again() -> None:
    """A run that was killed and begun again."""
    session: Any = Services()
    stage, kind = RECIPE.stages["small"], RECIPE.stages["small"].kind
    spec = kind.spec(stage, {"ref": [digest_bytes(b"old")]}, {})  # type: ignore[attr-defined]
    live = _done(spec, "RUNNING", request_digest=request_of(kind, spec))  # type: ignore[arg-type]

    class Watching(Services):
        def stream(self, method: str, request: Any, **_: Any) -> Any:
            return _Replies([job_pb2.WatchJobResponse(job=_done(spec))])

    session = Watching()
    session.listed = [live]
    found = await run_recipe(session, RECIPE)
    assert states(found)["small"] == "succeeded"
    assert not any(isinstance(one, importer_pb2.QuantizeSpec) and one.scheme == "Q8_0" for one in session.started)


class _Replies:
    def __init__(self, replies: list[Any]) -> None:
        self._replies = replies

    async def __aenter__(self) -> Any:
        async def each() -> Any:
            for reply in self._replies:
                yield reply

        return each()

    async def __aexit__(self, *_: object) -> None:
        return None


async def test_a_plan_says_what_is_stored_what_waits_and_what_would_be_refused() -> None:
    """R-006: a setting that its service does not know is found though the bundle that it is for is not there yet."""

    def planned(request: Any) -> Any:
        if request.spec.scheme == "Q4_0":
            raise BadConfig("scheme Q4_0 is not for this")
        if request.spec.bundle.endswith("0" * 64):
            raise UnknownArtifact("not there")
        return SimpleNamespace(plan=job_pb2.Plan(write_bytes=10))

    found = await outlooks(Services(PlanQuantize=planned), RECIPE)  # type: ignore[arg-type]
    assert {name: one.state for name, one in found.stages.items()} == {
        "small": "ready", "first": "ready", "second": "waits", "better": "waits", "never": "refused", "other": "waits",
    }  # fmt: skip
    assert [str(error) for error in found.refusals] == ["stage never: scheme Q4_0 is not for this"]
    assert found.stages["second"].document()["inputs"] == {"ref": [None]}


async def test_an_archive_is_written_beside_the_recipe_and_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Equal archives are equal bytes; another file of its name stays as it is, and no pod writes one."""

    async def written(_: Any, bundle: Any, run: Any, target: Path) -> dict[str, Any]:
        await asyncio.to_thread(target.write_text, bundle.digest)
        return {"path": str(target), "digest": digest_bytes(bundle.digest.encode())}

    async def run_of(session: Any, reference: str) -> Any:
        return await session.artifact(reference)

    monkeypatch.setattr("gateway.cli.archives.write_archive", written)
    monkeypatch.setattr("gateway.cli.commands.runs.find_run", run_of)
    stages = {"kept": {"archive": {"ref": "old", "file": "old.tar"}}}
    recipe = Recipe.of({"recipe": "tiny", "stages": stages}, tmp_path / "tiny.yaml")
    for _ in range(2):
        [found] = await run_recipe(Services(), recipe)  # type: ignore[arg-type]
        assert found.decision is not None and found.decision.found["path"] == "old.tar"
    (tmp_path / "old.tar").write_text("something else")
    [found] = await run_recipe(Services(), recipe)  # type: ignore[arg-type]
    assert isinstance(found.error, BadRequest) and (tmp_path / "old.tar").read_text() == "something else"
    with pytest.raises(BadRequest, match="stage kept writes a file to one machine"):
        workflow(recipe, PODS, 60)


async def test_what_takes_longer_says_whom_it_asks_and_every_refusal_names_its_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("smeltkit.limits.COMMAND_SILENCE_S", 0.0)
    is_told = asyncio.Event()

    class Slow(Services):
        async def call(self, method: str, request: Any, **rest: Any) -> Any:
            if method == "PlanQuantize":
                await is_told.wait()
            return await super().call(method, request, **rest)

    def spent(_: Any) -> Any:
        raise QuotaUsedUp("no tokens are left", retry_after_s=5.0)

    session: Any = Slow(PlanEvaluation=spent)
    monkeypatch.setattr(session.output, "note", lambda text: is_told.set() if "importer for small" in text else None)
    with pytest.raises(QuotaUsedUp, match="stage first: no tokens are left") as found:
        await outlooks(session, RECIPE)
    assert found.value.retry_after_s == 5.0
    stages = {"taught": {"train": {"base": "old", "data": "rows.jsonl", "name": "new"}}}
    with pytest.raises(UnknownSource, match=r"stage taught: .*rows.jsonl does not exist"):
        await pinned(session, Recipe.of({"recipe": "tiny", "stages": stages}, tmp_path / "tiny.yaml"))


@pytest.mark.parametrize(
    ("status", "code", "is_tried_again"),
    [("Failed", "5", True), ("Failed", "7", True), ("Failed", "-1", True), ("Failed", "137", True),
     ("Error", "1", True), ("Failed", "1", False), ("Failed", "2", False)],
)  # fmt: skip
def test_a_lost_pod_is_tried_again_and_a_refused_stage_is_not(status: str, code: str, is_tried_again: bool) -> None:
    """-1 is what Argo gives for a pod without a status of its container; a maxDuration would count from the start."""
    retries = workflow(RECIPE, PODS, 60)["spec"]["templates"][1]["retryStrategy"]
    last = SimpleNamespace(status=status, exitCode=code)
    assert eval(retries["expression"].replace("||", "or"), {"lastRetry": last, "asInt": int}) is is_tried_again
    assert set(retries["backoff"]) == {"duration", "factor"}


def test_a_workflow_gives_argos_own_containers_limits_and_no_rights() -> None:
    """A quota of limits forbids a pod of which any container has none."""
    spec = workflow(RECIPE, PODS, 60)["spec"]
    patch = json.loads(spec["podSpecPatch"])
    assert [one["name"] for one in (*patch["initContainers"], *patch["containers"])] == ["init", "wait"]
    for one in (*patch["initContainers"], *patch["containers"], spec["templates"][1]["container"]):
        assert {"cpu", "memory"} <= set(one["resources"]["limits"])
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_workflow_holds_what_no_pod_could_see_elsewhere() -> None:
    """Tasks wait for what their stages need; files of this machine, and what Argo would replace, are refused."""
    made = workflow(RECIPE, PODS, 60)
    tasks = {task["name"]: task for task in made["spec"]["templates"][0]["dag"]["tasks"]}
    assert tasks["never"]["dependencies"] == ["small", "better"]
    assert tasks["never"]["arguments"]["parameters"][1]["value"] == "small={{tasks.small.outputs.parameters.result}}"
    assert retried_codes() == [5, 7]
    with pytest.raises(BadRequest, match=r"stage start reads x/ore, which no pod can see.*smelt recipe pin"):
        workflow(_with({"import": {"source": "x/ore", "name": "ore"}}), PODS, 60)
    with pytest.raises(BadConfig, match="which Argo would replace"):
        workflow(_with({"gate": {"ref": "a", "report": ["b"], "clause": ["{{x}}"]}}), PODS, 60)


def _with(stage: Any) -> Recipe:
    return Recipe.of({"recipe": "tiny", "stages": {"start": stage}}, Path("tiny.yaml"))
