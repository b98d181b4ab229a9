"""The trainer on real NATS and S3: a training from start to a bundle that generates, and what is not built yet."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import pytest
from nats.aio.msg import Msg
from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from services.trainer.checkpoints.run_folders import RunFolders
from services.trainer.servicer import TrainerServicer
from services.trainer.worker import settings_of, train_key
from smeltkit import limits
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadConfig, BadDataset, BadRequest, BadSchedule, GpuBusy, NotBuilt, OutOfMemory
from smeltkit.gpus.ledger import WAITING
from smeltkit.ids import new_id
from smeltkit.jobs.stages import StageCache
from smeltkit.locks import file_lock
from smeltkit.manifest import PAUSED_TYPE, Manifest
from smeltkit.ml.bundle import Bundle
from smeltkit.rpc.channel import call, open_channel
from smeltkit.testing.exports import scalars_of
from smeltkit.testing.gpus import FakeNvidiaSmi, gpu
from smeltkit.testing.importing import ImportRig, succeeded, trainer_service
from smeltkit.testing.tiny_models import write_tiny_model
from smeltkit.testing.waiting import eventually

METHODS = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].methods
BUILT = {"PlanTrain", "StartTrain", "GetRun", "ListRuns", "ListGpus"}
SETTINGS = {"epochs": 2, "sequence_tokens": 128, "packs_per_step": 2, "learning_rate": "2e-3", "lora": {"rank": 4}}


@pytest.fixture(scope="module")
def smi(tmp_path_factory: pytest.TempPathFactory) -> FakeNvidiaSmi:
    """What the trainer's machine is told to be its GPUs; nothing is computed on them."""
    return FakeNvidiaSmi(tmp_path_factory.mktemp("smi"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainer lets trainings export to, a folder for each tool."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def address(
    import_platform: PlatformConfig, tmp_path_factory: pytest.TempPathFactory, smi: FakeNvidiaSmi, exported: Path
) -> Iterator[str]:
    settings = {
        "SMELT_TRAINER_NVIDIA_SMI": str(smi.program),
        "SMELT_TRAINER_TENSORBOARD_DIR": str(exported / "events"),
        "SMELT_TRAINER_MLFLOW_URI": (exported / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    with trainer_service(import_platform, tmp_path_factory.mktemp("trainer"), settings) as trainer:
        yield trainer.address


@pytest.fixture(autouse=True)
def free_gpu(smi: FakeNvidiaSmi) -> None:
    """One GPU, of which nothing is in use."""
    smi.tell(gpu(total=24 * limits.GIB))


@pytest.fixture
async def stub(address: str) -> AsyncIterator[trainer_pb2_grpc.TrainerServiceStub]:
    async with open_channel(address) as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


def _rows(path: Path, count: int) -> Path:
    """Lines about sums, short enough for any model."""
    path.write_text("".join(json.dumps({"text": f"{n} + 1 is {n + 1}, and so on."}) + "\n" for n in range(count)))
    return path


async def _spec(rig: ImportRig, folder: Path, base: str, **settings: object) -> trainer_pb2.TrainSpec:
    data = [rig.store.put_file(_rows(folder / f"{n}.jsonl", n))[0] for n in (24, 6)]
    return trainer_pb2.TrainSpec(
        base=base,
        method=trainer_pb2.Method.Value(f"METHOD_{str(settings.get('method', 'lora')).upper()}"),
        datasets=data,
        settings_json=json.dumps({**SETTINGS, **settings}),
        name="tiny:trained",
    )


async def test_a_training_ends_in_a_bundle_that_generates(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path, exported: Path
) -> None:
    """R-010, R-016, R-027, R-066, R-068: planned, trained in NF4, proven, named; forecast against outcome; found again;
    an alert that it declares goes off on its stream, in its progress and in its record; every step is exported."""
    heard: list[tuple[str, bytes]] = []

    async def hear(message: Msg) -> None:
        heard.append((message.subject, message.data))

    write_tiny_model(tmp_path / "model", "qwen3", is_chat=False)
    base = succeeded(await importing.import_folder(tmp_path / "model", "tiny"))
    alert = {"metric": "loss", "when": "above", "value": 0.5, "steps": 2}
    spec = await _spec(
        importing, tmp_path, "tiny", method="qlora", alerts=[alert], export={"tensorboard": True, "mlflow": "tiny"}
    )
    plan = (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan
    facts = {item.name: item.value for item in plan.items}
    assert not plan.refusals and plan.memory_bytes > 0 and plan.time_s > 0 and not plan.cached_digest
    assert facts["first sample"].startswith("0<< + 1 is 1, and so on.<|")
    assert facts["GPU"].startswith("1 of its own, 0.")
    assert facts["tokenized"] == "now, and kept for the run; processes: 1"
    request = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
    async with importing.bus.listen("smelt.evt.trainer.>", hear):
        done = await importing.end((await call(stub.StartTrain, request, timeout_s=60)).job)
        digest = succeeded(done)
        await eventually(lambda: any("bundle.stored" in subject for subject, _ in heard))
    run = (await call(stub.GetRun, trainer_pb2.GetRunRequest(bundle="tiny:trained"), timeout_s=60)).run
    assert run.bundle_digest == digest and run.forecast.time_s > 0
    assert run.outcome.tokens == run.forecast.tokens > 0 and "tokens" not in run.missed
    _check_facts(heard, run)
    record = importing.store.get_manifest(run.run_digest).config
    told = {"steps": record["steps"], "missed": 0, "error": ""}
    assert len(record["packing"]) == 1 and 0.5 < record["packing"][0] <= 1
    assert record["exports"] == {"tensorboard": told, "mlflow": told}
    losses = scalars_of(exported / "events" / done.id / "tiny:trained")["loss"]
    assert [step for step, _ in losses] == list(range(1, record["steps"] + 1))
    assert losses[-1][1] == pytest.approx(record["loss"]["last"])
    assert [(found.step, found.metric, found.when) for found in run.alerts] == [(2, "loss", "above")]
    assert list(done.progress.alerts) == [run.alerts[0].message] and run.alerts[0].message.endswith("2 steps in a row")
    assert done.progress.measured["tokens"] == run.outcome.tokens and 1 < len(done.progress.course) <= 64
    trained = Bundle.from_manifest(importing.store.get_manifest(digest))
    assert (trained.lineage.operation, trained.lineage.inputs) == ("train", (base, *spec.datasets))
    heldout = trained.lineage.parameters["heldout"]
    assert heldout["high"] < 0 and heldout["rows"] == 6
    assert not {"alerts", "export"} & trained.lineage.parameters["settings"].keys()
    assert trained.lineage.parameters["dequantization"]["scheme"] == "nf4"
    assert await importing.catalog.resolve("tiny:trained") == digest != base
    again = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
    job = (await call(stub.StartTrain, again, timeout_s=60)).job
    assert job.is_cached and job.result_digest == digest
    plan = (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan
    assert {item.name: item.value for item in plan.items}["tokenized"] == "before, and kept since"


async def test_a_training_that_paused_goes_on_in_another_job(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path
) -> None:
    """R-057: what it did is stored with its measurements, planned for, not done again, and part of its record.

    It stops early, since what is held out is of another kind, and is stored in its best weights, those of the pause.
    """
    write_tiny_model(tmp_path / "model", "qwen2", is_chat=False)
    succeeded(await importing.import_folder(tmp_path / "model", "tiny-paused"))

    async def plan(spec: trainer_pb2.TrainSpec) -> job_pb2.Plan:
        return (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan

    async def train(spec: trainer_pb2.TrainSpec) -> Manifest:
        request = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
        done = await importing.end((await call(stub.StartTrain, request, timeout_s=60)).job)
        return importing.store.get_manifest(succeeded(done))

    wild = {"seed": 57, "learning_rate": 0.02, "early_stop": {"steps": 1, "patience": 2}, "keep_checkpoints": 1}
    whole = await _spec(importing, tmp_path, "tiny-paused", **wild)
    paused = await _spec(importing, tmp_path, "tiny-paused", **wild, until_step=1)
    (tmp_path / "other.jsonl").write_text("".join(f'{{"text": "{"zebra quilt " * n}"}}\n' for n in range(1, 7)))
    for spec in (whole, paused):
        spec.datasets[1] = importing.store.put_file(tmp_path / "other.jsonl")[0]
    assert (await plan(paused)).counts["steps"] == 1
    first = await train(paused)
    assert (first.artifact_type, first.config["step"], first.config["heldout"]["rows"]) == (PAUSED_TYPE, 1, 6)
    assert (await plan(paused)).cached_digest == first.digest
    left = await plan(whole)
    assert left.counts["steps_stored"] == 1 < left.counts["steps"]
    assert {item.name: item.value for item in left.items}["goes on from"].startswith("step 1, which is stored")
    made = await train(whole)
    run = (await call(stub.GetRun, trainer_pb2.GetRunRequest(bundle=made.digest), timeout_s=60)).run
    assert left.counts["tokens"] > run.outcome.tokens > first.config["cost"]["tokens"] > 0
    record = importing.store.get_manifest(run.run_digest)
    layers = {layer.path: layer for layer in record.layers}
    lines = {
        path: [json.loads(line) for line in importing.store.get_bytes(layer.digest).splitlines()]
        for path, layer in layers.items()
    }
    assert [line["step"] for line in lines["metrics.jsonl"]] == [1, 2, 3]
    assert [line["step"] for line in lines["heldout.jsonl"]] == [0, 1, 2, 3]
    assert record.config["best"] == {"step": 1, "of": 3} and record.config["stopped"]["step"] == 3
    told = Bundle.from_manifest(made).lineage.parameters
    assert told["best"] == record.config["best"] and told["heldout"] == first.config["heldout"]


async def test_a_training_waits_for_a_gpu_in_use_or_is_refused(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path, smi: FakeNvidiaSmi
) -> None:
    """Refused at once by default, with the remedy; with it the job waits, says why, and can be cancelled."""
    write_tiny_model(tmp_path / "model", "qwen2", is_chat=False)
    succeeded(await importing.import_folder(tmp_path / "model", "tiny-waiting"))
    spec = await _spec(importing, tmp_path, "tiny-waiting")
    smi.tell(gpu(total=24 * limits.GIB, used=23 * limits.GIB))
    plan = (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan
    assert [refusal.reason for refusal in plan.refusals] == ["GPU_BUSY"] and plan.time_s == 0

    async def start(**terms: Any) -> job_pb2.Job:
        spec.gpu.CopyFrom(trainer_pb2.GpuTerms(**terms))
        request = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
        job: job_pb2.Job = (await call(stub.StartTrain, request, timeout_s=60)).job
        return job

    with pytest.raises(GpuBusy, match="0.5 GiB of 24.0 GiB free.*--wait-gpu"):
        await start()
    with pytest.raises(OutOfMemory, match="raise --vram"):
        await start(memory_bytes=limits.MIB)
    job = await start(waits=True)
    async with aclosing(importing.ledger.watch(job.id)) as seen:
        async for state in seen:
            if state.progress.phase == WAITING:
                break
    assert "0.5 GiB of 24.0 GiB free" in state.progress.message
    leases = (await call(stub.ListGpus, trainer_pb2.ListGpusRequest(), timeout_s=60)).leases
    assert [(one.job_id, one.title, list(one.gpus)) for one in leases] == [(job.id, "tiny:trained", [])]
    await importing.ledger.cancel(job.id)
    assert (await importing.end(job)).state == job_pb2.JOB_STATE_CANCELLED
    assert not (await call(stub.ListGpus, trainer_pb2.ListGpusRequest(), timeout_s=60)).leases


async def test_adapters_trained_together_are_found_again_alone(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path
) -> None:
    """R-013: one job; each adapter has bundle, lineage, run and name of its own, and is known to a training alone. It
    goes on from where another job let all of them pause.

    One of them has two stages: told as it enters the second, in its lineage and its record by every digest.
    """
    entered: list[event_pb2.TrainingStage] = []

    async def hear(message: Msg) -> None:
        entered.append(event_pb2.TrainingStage.FromString(message.data))

    write_tiny_model(tmp_path / "model", "qwen2", is_chat=False)
    base = succeeded(await importing.import_folder(tmp_path / "model", "tiny-shared"))
    specs = [await _spec(importing, tmp_path, "tiny-shared", learning_rate=rate) for rate in (1e-3, 2e-3)]
    for spec, name in zip(specs, ("tiny:low", "tiny:high"), strict=True):
        spec.name = name
    stages = {**SETTINGS, "learning_rate": 2e-3, "stages": [{"epochs": 1}, {"mix": [1, 2]}]}
    specs[1].settings_json = json.dumps({key: value for key, value in stages.items() if key != "epochs"})
    data, heldout = specs[1].datasets
    further = importing.store.put_file(_rows(tmp_path / "further.jsonl", 30))[0]
    specs[1].datasets[:] = [data, data, further, heldout]
    plan = (
        await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=specs[0], together=specs[1:]), timeout_s=60)
    ).plan
    assert not plan.refusals and plan.memory_bytes > 0
    assert {"tiny:low, steps", "tiny:high, stage 2"} <= {item.name for item in plan.items}
    paused = [trainer_pb2.TrainSpec.FromString(spec.SerializeToString()) for spec in specs]
    for spec in paused:
        spec.settings_json = json.dumps({**json.loads(spec.settings_json), "until_step": 1})
    request = trainer_pb2.StartTrainRequest(spec=paused[0], together=paused[1:], request_id=uuid4().hex)
    made = succeeded(await importing.end((await call(stub.StartTrain, request, timeout_s=60)).job))
    states = [
        importing.store.get_manifest(one) for one in importing.store.get_manifest(made).config["bundles"].values()
    ]
    assert [(state.artifact_type, state.config["step"]) for state in states] == [(PAUSED_TYPE, 1)] * 2
    request = trainer_pb2.StartTrainRequest(spec=specs[0], together=specs[1:], request_id=uuid4().hex)
    async with importing.bus.listen("smelt.evt.trainer.stage.entered.>", hear):
        done = await importing.end((await call(stub.StartTrain, request, timeout_s=60)).job)
        made = succeeded(done)
        await eventually(lambda: bool(entered))
    (stage,) = entered
    assert (stage.name, list(stage.before), list(stage.after)) == ("tiny:high", [data], [data, further])
    assert list(done.progress.notes) == [f"tiny:high: {stage.message}"] and stage.heldout_loss > 0
    bundles = importing.store.get_manifest(made).config["bundles"]
    assert bundles.keys() == {"tiny:low", "tiny:high"} and len(set(bundles.values())) == 2
    for spec in specs:
        digest = bundles[spec.name]
        assert await importing.catalog.resolve(spec.name) == digest
        lineage = Bundle.from_manifest(importing.store.get_manifest(digest)).lineage
        assert lineage.inputs == (base, *spec.datasets) and lineage.parameters["heldout"]["rows"] == 6
        run = (await call(stub.GetRun, trainer_pb2.GetRunRequest(bundle=digest), timeout_s=60)).run
        assert run.outcome.tokens > 0 and run.bundle_digest == digest
        alone = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
        job = (await call(stub.StartTrain, alone, timeout_s=60)).job
        assert job.is_cached and job.result_digest == digest
    listed = (await call(stub.ListRuns, trainer_pb2.ListRunsRequest(limit=2), timeout_s=60)).runs
    assert {run.subject for run in listed} == set(bundles.values())
    records = {run.subject: json.loads(run.config_json) for run in listed}
    assert all((record["settings"]["lora"]["rank"], record["together"]) == (4, 2) for record in records.values())
    assert all([one["step"] for one in record["course"]][:2] == [0, 1] for record in records.values())
    assert [one["data"] for one in records[bundles["tiny:high"]]["stages"]] == [[data], [data, further]]


def _check_facts(heard: list[tuple[str, bytes]], run: event_pb2.TrainingFinished) -> None:
    """The last step was told as it was stored, the end with what its record holds."""
    steps = [event_pb2.TrainingStep.FromString(data) for subject, data in heard if ".step.measured." in subject]
    ends = [event_pb2.TrainingFinished.FromString(data) for subject, data in heard if ".training.finished." in subject]
    assert steps[-1].step == steps[-1].steps and steps[-1].tokens == run.outcome.tokens and steps[-1].loss > 0
    alerts = [event_pb2.TrainingAlert.FromString(data) for subject, data in heard if ".alert.fired." in subject]
    assert ends == [run] and alerts == list(run.alerts)


async def test_folders_of_runs_that_are_over_are_removed(importing: ImportRig, tmp_path: Path) -> None:
    """Cancelled, failed or unknown: gone, unless somebody works there; what may go on from its checkpoints stays."""
    job = await importing.ledger.start(
        service="nobody", kind="train", request=trainer_pb2.TrainSpec(), request_id=uuid4().hex
    )
    gone, folders = new_id("job"), RunFolders(tmp_path, importing.ledger)
    for job_id in (job.id, gone):
        (folders.of(job_id) / "checkpoints").mkdir(parents=True)
    with file_lock(folders.lock_of(gone)):
        assert await folders.reap() == []
    assert await folders.reap() == [gone]
    await importing.ledger.cancel(job.id)
    assert await folders.reap() == [job.id] and not folders.of(job.id).exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"max_steps": 10_000}, BadSchedule), ({"warmup_steps": 5}, BadSchedule), ({"sequence_tokens": "1K"}, BadConfig)],
    ids=str,
)
async def test_what_the_plan_refuses_does_not_start(
    importing: ImportRig,
    stub: trainer_pb2_grpc.TrainerServiceStub,
    tmp_path: Path,
    settings: dict[str, object],
    error: type[Exception],
) -> None:
    """R-045: the plan tells why, and starting raises it before a job exists."""
    write_tiny_model(tmp_path / "model", "qwen3", is_chat=False)
    base = succeeded(await importing.import_folder(tmp_path / "model", "tiny"))
    spec = await _spec(importing, tmp_path, base, **settings)
    plan = (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan
    assert [refusal.reason for refusal in plan.refusals] == [error.reason()]  # type: ignore[attr-defined]
    with pytest.raises(error):
        request = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
        await call(stub.StartTrain, request, timeout_s=60)


async def test_a_wrong_row_is_told_by_the_name_that_its_user_gave_the_file(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path
) -> None:
    """Told by the plan, with its row; of no part of what is trained. A name that is a path is refused."""
    write_tiny_model(tmp_path / "model", "qwen2", is_chat=False)
    base = succeeded(await importing.import_folder(tmp_path / "model", "tiny-named"))
    spec = await _spec(importing, tmp_path, base)
    named = trainer_pb2.TrainSpec.FromString(spec.SerializeToString())
    named.dataset_names[:] = ["train.jsonl", "held.jsonl"]
    keys = [train_key(StageCache(importing.bus, AsyncMock()), one, settings_of(one)) for one in (spec, named)]
    assert keys[0] == keys[1]
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": 5}\n')
    named.datasets[1] = importing.store.put_file(tmp_path / "wrong.jsonl")[0]
    with pytest.raises(BadDataset, match=r"^held.jsonl \(held-out data\) row 3: text is 5"):
        await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=named), timeout_s=60)
    for names, says in ((["in/train.jsonl", "held.jsonl"], "without folders"), (["a"], "1 names for 2 data sets")):
        named.dataset_names[:] = names
        with pytest.raises(BadRequest, match=says):
            await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=named), timeout_s=60)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name not in BUILT], ids=lambda method: method.name)
async def test_verbs_that_are_not_built_say_so(stub: trainer_pb2_grpc.TrainerServiceStub, method: object) -> None:
    """A caller gets UNIMPLEMENTED with reason NOT_BUILT, never an empty answer."""
    request = getattr(trainer_pb2, f"{method.name}Request")()  # type: ignore[attr-defined]
    with pytest.raises(NotBuilt, match="not built in this release"):
        await call(getattr(stub, method.name), request, timeout_s=5)  # type: ignore[attr-defined]


def test_servicer_overrides_every_declared_call() -> None:
    """A call added to the contract cannot fall back to the generated answer without a reason."""
    own = {name for name, _ in inspect.getmembers(TrainerServicer, inspect.isfunction) if name in vars(TrainerServicer)}
    assert own - {"__init__"} == {method.name for method in METHODS}
