"""Who must not reach what: every cell is tried, on real sockets with real certificates and keys.

RPC: each caller, known or not, at each method of each service. HTTP: each route without a key, with a wrong one, and
for a model that is not the tenant's. NATS: test_bus_users.py tries subjects and buckets with the cluster's own files.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from edge_fakes import MODEL, served_edge
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.importer.v1 import importer_pb2
from smelt.inference.v1 import inference_pb2
from smelt.job.v1 import job_pb2
from smelt.sandbox.v1 import sandbox_pb2
from smelt.tenant.v1 import tenant_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.http.edge import INSIDE_ROUTES, OPEN_ROUTES
from gateway.tenants.keys import hash_key
from smeltkit.rpc.access import MAY_CALL, OPERATOR, may_call
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.rpc.tls import Identity
from smeltkit.testing.certificates import Authority
from smeltkit.testing.rpc import Handlers

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "importer": importer_pb2,
    "trainer": trainer_pb2,
    "inference": inference_pb2,
    "evaluator": evaluator_pb2,
    "sandbox": sandbox_pb2,
}
CALLERS = (*MAY_CALL, "nobody")
SOURCES = {
    "importer": ("smeltkit/probing.py", "smeltkit/routing/*.py"),
    "trainer": ("smeltkit/probing.py", "smeltkit/routing/*.py"),
    "evaluator": ("services/evaluator/*.py", "smeltkit/routing/*.py"),
}
"""Where each caller's calls stand."""


def methods_of(service: str) -> list[str]:
    """Full names of the methods that a process of `service` serves: the gateway passes on those of all."""
    if service == "gateway":
        modules: list[Any] = [*PACKAGES.values(), artifact_pb2, job_pb2, tenant_pb2]
    else:
        modules = [PACKAGES[service]]
    declared = [found for module in modules for found in module.DESCRIPTOR.services_by_name.values()]
    return [f"/{found.full_name}/{name}" for found in declared for name in found.methods_by_name]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One authority for all."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Who calls itself the gateway by another authority's word."""
    return Authority(tmp_path_factory.mktemp("stranger")).identity("gateway")


@asynccontextmanager
async def serving(service: str, authority: Authority) -> AsyncIterator[str]:
    """The address of a process of `service` that answers every one of its calls with nothing."""

    async def answer(request: bytes, context: Any) -> bytes:
        return b""

    host = ServiceHost(service, RpcConfig(tls_dir=str(authority.folder_of(service))))
    host.add_generic(Handlers({name: grpc.unary_unary_rpc_method_handler(answer) for name in methods_of(service)}))
    host.set_ready(True)
    await host.start()
    try:
        yield host.address
    finally:
        await host.stop()


async def outcomes(address: str, service: str, identity: Identity | None) -> dict[str, str]:
    """What each method answers to this caller: OK, or the status."""
    async with open_channel(address, identity=identity, peer=service, is_retrying=False) as channel:

        async def outcome(method: str) -> str:
            try:
                await channel.unary_unary(method)(b"", timeout=10)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        methods = methods_of(service)
        return dict(zip(methods, await asyncio.gather(*map(outcome, methods)), strict=True))


@pytest.mark.parametrize("service", ["gateway", *PACKAGES])
async def test_each_call_of_each_caller_is_let_in_or_refused_as_the_table_says(
    service: str, authority: Authority, stranger: Identity
) -> None:
    async with serving(service, authority) as address:
        for caller in CALLERS:
            expected = {
                method: "OK" if may_call(caller, service, method) else "PERMISSION_DENIED"
                for method in methods_of(service)
            }
            assert await outcomes(address, service, authority.identity(caller)) == expected, caller
        for outsider in (None, stranger):
            assert set((await outcomes(address, service, outsider)).values()) == {"UNAVAILABLE"}


def test_the_table_holds_what_the_callers_sources_call_and_no_more() -> None:
    """A right that nobody needs is one too many, and a call without one would fail in a cluster only."""
    for caller, patterns in SOURCES.items():
        text = "".join(path.read_text() for pattern in patterns for path in ROOT.glob(pattern))
        called = set(re.findall(r"stub\.([A-Z]\w+)", text))
        assert set().union(*MAY_CALL[caller].values()) == called, caller
    assert set(MAY_CALL) - set(SOURCES) == {OPERATOR, "gateway", "inference", "sandbox"}


def test_the_pairs_of_the_table_are_those_of_the_settings() -> None:
    """Whoever is told an address may call there, and nobody else."""
    pairs = set(_addresses())
    assert pairs == {
        (caller, service) for caller, services in MAY_CALL.items() for service in services if caller != OPERATOR
    }


def _addresses() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "deploy" / "k8s" / "base").glob("*/settings.env"):
        for match in re.findall(r"^SMELT_[A-Z]+?_([A-Z]+)_ADDRESS=", path.read_text(), flags=re.MULTILINE):
            yield path.parent.name, match.lower()


def routes() -> list[tuple[str, str]]:
    """Method and path of every route; a test holds the file and the application together."""
    paths = yaml.safe_load((ROOT / "contracts" / "interface" / "openapi.yaml").read_text())["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


async def test_each_route_refuses_whoever_has_no_key_and_each_tenant_the_models_of_others(tmp_path: Path) -> None:
    """401 before anything else is looked at, also at addresses that do not exist; 403 for another's model."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice {hash_key('sk-alice')} models=ore-11m\n")
    right, wrong = (
        {"authorization": "Bearer sk-alice"},
        ("", "Bearer", "Bearer sk-eve", f"Bearer {hash_key('sk-alice')}"),
    )
    async with served_edge(api_keys_file=str(keys)) as edge, httpx.AsyncClient(base_url=edge.url) as http:
        tried = [*routes(), ("GET", "/no/such/route"), ("DELETE", "/v1/models"), ("POST", "/healthz/more")]
        assert len(tried) >= 11
        for method, template in tried:
            path = template.replace("{model}", "ore-11m")
            for header in wrong:
                answer = await http.request(method, path, headers={"authorization": header}, json={})
                if path in OPEN_ROUTES:
                    assert answer.status_code == 200, path
                    continue
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["type"]) == (
                    401, "BAD_API_KEY", "authentication_error",
                ), (method, path, header)  # fmt: skip
            for model in ("ore-11m:q8_0", MODEL) if method == "POST" and path.startswith("/v1/") else ():
                prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
                answer = await http.request(method, path, headers=right, json={"model": model, **prompt})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "KEY_DENIED"), (path, model)
        assert (await http.get("/v1/models/ore-11m:q8_0", headers=right)).status_code == 403
        assert {(await http.get(path, headers=right)).status_code for path in INSIDE_ROUTES} == {403}
        assert not edge.inference.requests
