"""The trainer service of this release: healthy, and honest about what it does not do yet."""

from __future__ import annotations

import inspect

import pytest
from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from services.trainer.servicer import TrainerServicer
from smeltkit.errors import NotBuilt
from smeltkit.rpc.channel import call, open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost

METHODS = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].methods


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_every_verb_is_refused_with_its_reason(method: object) -> None:
    """R-012: a caller gets UNIMPLEMENTED with reason NOT_BUILT, never an empty or a made-up answer."""
    host = ServiceHost("trainer", RpcConfig())
    host.add(
        "smelt.trainer.v1.TrainerService", trainer_pb2_grpc.add_TrainerServiceServicer_to_server, TrainerServicer()
    )
    host.set_ready(True)
    await host.start()
    try:
        async with open_channel(host.address) as channel:
            stub = trainer_pb2_grpc.TrainerServiceStub(channel)
            request = getattr(trainer_pb2, f"{method.name}Request")()
            with pytest.raises(NotBuilt, match="not built in this release"):
                await call(getattr(stub, method.name), request, timeout_s=5)
    finally:
        await host.stop()


def test_servicer_overrides_every_declared_call() -> None:
    """A call added to the contract cannot fall back to the generated answer without a reason."""
    own = {name for name, _ in inspect.getmembers(TrainerServicer, inspect.isfunction) if name in vars(TrainerServicer)}
    assert own == {method.name for method in METHODS}
