"""Whole evaluations with every part real: importer, inference, sandbox and evaluator as processes, a real model."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest
from evaluator_rig import EvaluatorRig, evaluator_process, evaluator_rig, platform_settings
from smelt.job.v1 import job_pb2

from services.evaluator.data import DataSource
from services.evaluator.suites import find_suite
from smeltkit.blobs.local import LocalStore
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.manifest import REFERENCE_TYPE
from smeltkit.testing.importing import import_rig, succeeded
from smeltkit.testing.nats import nats_server
from smeltkit.testing.processes import ServiceProcess, service_process
from smeltkit.testing.s3 import S3Server, fresh_store

ROOT = Path(__file__).parents[2]
DATA_DIR = ROOT.parent / "shared" / "data"
MODEL = ROOT / "examples" / "models" / "ore-11m"
LIMIT = 30
"""Problems of an evaluation in the middle of which something is killed."""
CHEATS = {
    "exit": "    import os; os._exit(0)\n",
    "system exit": "    raise SystemExit(0)\n",
    "equal to everything": "    return type('E', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()\n",
}


@dataclass(frozen=True)
class Site:
    """Four running services, and the bundle that they serve as `ore`."""

    platform: PlatformConfig
    evaluator: ServiceProcess
    inference: ServiceProcess
    sandbox: ServiceProcess


@contextmanager
def _services(platform: PlatformConfig, folder: Path) -> Iterator[Site]:
    shared = platform_settings(platform)
    engine = {
        **shared,
        "SMELT_INFERENCE_CACHE_DIR": str(folder / "inference"),
        "SMELT_INFERENCE_KV_BYTES": "67108864",
    }
    with ExitStack() as stack:
        sandbox = stack.enter_context(service_process("sandbox", {}, folder))
        inference = stack.enter_context(service_process("inference", engine, folder))
        importing = {
            **shared,
            "SMELT_IMPORTER_CACHE_DIR": str(folder / "importer"),
            "SMELT_IMPORTER_INFERENCE_ADDRESS": inference.address,
        }
        importer = stack.enter_context(service_process("importer", importing, folder))
        asyncio.run(_import_model(importer.address, platform, folder))
        importer.kill()
        addresses = {"inference": inference.address, "sandbox": sandbox.address}
        evaluator = stack.enter_context(evaluator_process(platform, folder, data_dir=DATA_DIR, **addresses))
        yield Site(platform, evaluator, inference, sandbox)


async def _import_model(address: str, platform: PlatformConfig, folder: Path) -> None:
    async with import_rig(address, platform, folder / "uploads") as importing:
        succeeded(await importing.import_folder(MODEL, "ore"))


@pytest.fixture(scope="module")
def site(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Services for this file, with a bucket and a queue of their own: nobody else takes their jobs."""
    folder = tmp_path_factory.mktemp("real")
    with nats_server() as nats:
        platform = replace(fresh_store(s3, folder / "uploads").config, nats_url=nats.url)

        async def prepare() -> None:
            bus = await Bus.connect(platform, name="topology")
            await topology.apply(bus)
            await bus.close()

        asyncio.run(prepare())
        with _services(platform, folder) as made:
            yield made


@pytest.fixture
async def evaluating(site: Site, tmp_path: Path) -> AsyncIterator[EvaluatorRig]:
    """A caller of the running evaluator."""
    async with evaluator_rig(site.evaluator.address, site.platform, tmp_path) as caller:
        yield caller


@pytest.mark.parametrize(("suite", "count"), [("basic", 200), ("humaneval", 164), ("mbpp", 500)])
async def test_every_reference_solution_passes(suite: str, count: int, evaluating: EvaluatorRig) -> None:
    """R-085, R-086: all of them, three times each, in the order that the suite records."""
    started = await evaluating.ask("StartReferenceCheck", spec={"suite": suite}, request_id=uuid4().hex)
    manifest = evaluating.store.get_manifest(succeeded(await evaluating.end(started.job)))
    assert manifest.artifact_type == REFERENCE_TYPE
    assert manifest.config["failed"] == {}
    assert (manifest.config["passed"], manifest.config["total"]) == (count, count)


@pytest.mark.parametrize("suite", ["basic", "humaneval", "mbpp"])
async def test_every_cheat_scores_nothing(suite: str, evaluating: EvaluatorRig, tmp_path: Path) -> None:
    """R-082, R-083: leaving with status 0, or an object that equals everything, is no pass on any suite."""
    lines = [
        json.dumps({"task_id": row["task_id"], "completion": _cheat(row, body)})
        for row in _rows(suite, tmp_path)
        for body in CHEATS.values()
    ]
    digest = evaluating.store.put_bytes("\n".join(lines).encode())
    spec = {"suite": suite, "completions_digest": digest}
    job = (await evaluating.ask("StartJudgement", spec=spec, request_id=uuid4().hex)).job
    reply = await evaluating.report(job, with_samples=True)
    assert reply.report.scores[0].samples == len(CHEATS)
    assert [sample.problem for sample in reply.samples if sample.verdict == "passed"] == []


@pytest.mark.parametrize("victim", ["inference", "sandbox", "evaluator"])
async def test_a_service_killed_in_the_middle_costs_nothing(victim: str, site: Site, evaluating: EvaluatorRig) -> None:
    """Same job, same problems, each once, and the score of an undisturbed run."""
    undisturbed = (await evaluating.report(await evaluating.start(bundle="ore", limit=LIMIT))).report.scores[0]
    seed = {"inference": 1, "sandbox": 2, "evaluator": 3}[victim]
    job = await evaluating.start(bundle="ore", limit=LIMIT, seed=seed)
    await evaluating.until(job, lambda seen: seen.progress.phase == "generate" and seen.progress.done >= 5)
    process: ServiceProcess = getattr(site, victim)
    process.kill()
    process.start()
    done = await evaluating.end(job)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    reply = await evaluating.report(job, with_samples=True)
    assert len({sample.problem for sample in reply.samples}) == len(reply.samples) == LIMIT
    assert abs(reply.report.scores[0].passed - undisturbed.passed) <= 1


def _rows(suite: str, folder: Path) -> list[dict[str, object]]:
    """Rows of a suite's problems: from beside the repository, else from their published home."""
    found = find_suite(suite)
    data = DataSource(LocalStore(folder), DATA_DIR).read(found)
    text = gzip.decompress(data) if found.data.file.endswith(".gz") else data
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if found.first <= int(str(row["task_id"]).rpartition("/")[2]) <= found.last]


def _cheat(row: dict[str, object], body: str) -> str:
    """A completion that cheats: the body of the function, or for MBPP a program that defines it."""
    if "prompt" in row:
        return body
    tests = row["test_list"]
    assert isinstance(tests, list)
    name = tests[0].removeprefix("assert ").lstrip("(").split("(")[0].strip()
    return f"def {name}(*args, **kwargs):\n{body}" if name.isidentifier() else body.lstrip()
