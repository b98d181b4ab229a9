"""The trainer on real NATS and S3: a training from start to a bundle that generates, and what is not built yet."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from services.trainer.servicer import TrainerServicer
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadConfig, BadSchedule, NotBuilt
from smeltkit.ml.bundle import Bundle
from smeltkit.rpc.channel import call, open_channel
from smeltkit.testing.importing import ImportRig, succeeded, trainer_service
from smeltkit.testing.tiny_models import write_tiny_model

METHODS = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].methods
BUILT = {"PlanTrain", "StartTrain"}
SETTINGS = {"epochs": 2, "sequence_tokens": 128, "packs_per_step": 2, "learning_rate": "2e-3", "lora": {"rank": 4}}


@pytest.fixture(scope="module")
def address(import_platform: PlatformConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with trainer_service(import_platform, tmp_path_factory.mktemp("trainer")) as trainer:
        yield trainer.address


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
        method=trainer_pb2.METHOD_LORA,
        datasets=data,
        settings_json=json.dumps({**SETTINGS, **settings}),
        name="tiny:trained",
    )


async def test_a_training_ends_in_a_bundle_that_generates(
    importing: ImportRig, stub: trainer_pb2_grpc.TrainerServiceStub, tmp_path: Path
) -> None:
    """R-016, R-066: planned, trained, merged, probed, named, with lineage and held-out loss; then found again."""
    write_tiny_model(tmp_path / "model", "qwen3", is_chat=False)
    base = succeeded(await importing.import_folder(tmp_path / "model", "tiny"))
    spec = await _spec(importing, tmp_path, "tiny")
    plan = (await call(stub.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec), timeout_s=60)).plan
    facts = {item.name: item.value for item in plan.items}
    assert not plan.refusals and plan.memory_bytes > 0 and not plan.cached_digest
    assert facts["first sample"].startswith("0<< + 1 is 1, and so on.<|")
    request = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
    digest = succeeded(await importing.end((await call(stub.StartTrain, request, timeout_s=60)).job))
    trained = Bundle.from_manifest(importing.store.get_manifest(digest))
    assert (trained.lineage.operation, trained.lineage.inputs) == ("train", (base, *spec.datasets))
    heldout = trained.lineage.parameters["heldout"]
    assert heldout["high"] < 0 and heldout["rows"] == 6
    assert await importing.catalog.resolve("tiny:trained") == digest != base
    again = trainer_pb2.StartTrainRequest(spec=spec, request_id=uuid4().hex)
    job = (await call(stub.StartTrain, again, timeout_s=60)).job
    assert job.is_cached and job.result_digest == digest


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
