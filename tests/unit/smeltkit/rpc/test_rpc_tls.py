"""Certificates between services: who is let in, what is refused at start, and what a rotation changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.inference.v1 import inference_pb2, inference_pb2_grpc

from smeltkit.config import environment
from smeltkit.errors import BadCertificate, CallerDenied, ServiceUnavailable
from smeltkit.rpc import health
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.rpc.tls import Identity
from smeltkit.servers import free_ports
from smeltkit.testing.certificates import Authority


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers what the tests call."""

    async def Probe(self, request: Any, context: Any) -> inference_pb2.ProbeResponse:
        return inference_pb2.ProbeResponse(engine_digest="probed")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for _ in range(3):
            yield inference_pb2.GenerateResponse()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Our own authority."""
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Somebody else's, which issues the same names."""
    return Authority(tmp_path_factory.mktemp("strangers"))


@asynccontextmanager
async def inference_on(folder: Path) -> AsyncIterator[ServiceHost]:
    """The inference service with the certificate in `folder`."""
    host = ServiceHost("inference", RpcConfig(tls_dir=str(folder)))
    host.add(
        "smelt.inference.v1.InferenceService",
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        Inference(),
    )
    host.set_ready(True)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()


async def probe(address: str, identity: Identity | None, peer: str = "inference") -> str:
    """What the service answers to this caller."""
    async with open_channel(address, identity=identity, peer=peer, is_retrying=False) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return str((await call(stub.Probe, inference_pb2.ProbeRequest(), timeout_s=5)).engine_digest)


async def test_whom_the_table_names_is_let_in_and_others_are_not(authority: Authority) -> None:
    async with inference_on(authority.folder_of("inference")) as host:
        assert await probe(host.address, authority.identity("importer")) == "probed"
        for caller in ("evaluator", "sandbox", "operator", "nobody"):
            with pytest.raises(CallerDenied, match=f"^{caller} may not call /smelt.inference.v1.*Probe of inference"):
                await probe(host.address, authority.identity(caller))
        async with open_channel(
            host.address, identity=authority.identity("evaluator"), peer="inference", is_retrying=False
        ) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            async with stream(stub.Generate, inference_pb2.GenerateRequest(), timeout_s=5) as replies:
                assert len([reply async for reply in replies]) == 3


async def test_who_has_no_certificate_of_ours_does_not_get_through(authority: Authority, stranger: Authority) -> None:
    async with inference_on(authority.folder_of("inference")) as host:
        for identity in (None, stranger.identity("importer")):
            with pytest.raises(ServiceUnavailable):
                await probe(host.address, identity)
        credentials = grpc.ssl_channel_credentials((authority.folder_of("importer") / "ca.crt").read_bytes())
        options = [("grpc.ssl_target_name_override", "inference")]
        async with grpc.aio.secure_channel(host.address, credentials, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not health.is_serving(host.address)


async def test_a_caller_does_not_talk_to_another_service_than_it_means(
    authority: Authority, stranger: Authority
) -> None:
    """Whoever sits at the address of inference must have its certificate."""
    for folder in (authority.folder_of("inference"), stranger.folder_of("inference")):
        async with inference_on(folder) as host:
            with pytest.raises(ServiceUnavailable):
                await probe(host.address, authority.identity("gateway"), peer="sandbox")


async def test_new_files_are_taken_without_a_restart_and_half_of_a_rotation_is_not(
    authority: Authority, tmp_path: Path
) -> None:
    """The whole authority is replaced: who still has an old certificate is out, and who was renewed is in."""
    ours, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    served, calling = ours.folder_of("inference"), ours.folder_of("importer")
    async with inference_on(served) as host:
        identity = Identity(calling)
        async with open_channel(host.address, identity=identity, peer="inference", is_retrying=False) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.ProbeRequest()
            await call(stub.Probe, request, timeout_s=5)
            shutil.copy(new.folder_of("inference") / "tls.key", served / "tls.key")
            assert await probe(host.address, ours.identity("trainer")) == "probed"
            for name, folder in (("inference", served), ("importer", calling)):
                for part in ("ca.crt", "tls.key", "tls.crt"):
                    shutil.copy(new.folder_of(name) / part, folder / part)
            assert (await call(stub.Probe, request, timeout_s=5)).engine_digest == "probed"
        with pytest.raises(ServiceUnavailable):
            await probe(host.address, ours.identity("trainer"))
        assert await probe(host.address, new.identity("trainer")) == "probed"


def _missing(folder: Path, stranger: Authority) -> None:
    (folder / "tls.key").unlink()


def _foreign_authority(folder: Path, stranger: Authority) -> None:
    shutil.copy(stranger.folder_of("sandbox") / "ca.crt", folder / "ca.crt")


def _foreign_key(folder: Path, stranger: Authority) -> None:
    shutil.copy(stranger.folder_of("sandbox") / "tls.key", folder / "tls.key")


def _garbage(folder: Path, stranger: Authority) -> None:
    (folder / "tls.crt").write_text("no certificate")


def _encrypted(folder: Path, stranger: Authority) -> None:
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", "tls.key", "-out", "tls.key"],
        cwd=folder,
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_missing, "tls.key: No such file.*must name a folder with"),
        (_foreign_authority, "would be refused: .*(issuer|signature).*be issued by ca.crt"),
        (_foreign_key, "must belong to tls.key"),
        (_garbage, "would be refused"),
        (_encrypted, "is encrypted; store it in the clear"),
    ],
)
def test_a_certificate_that_others_would_refuse_is_refused_at_start(
    authority: Authority, stranger: Authority, tmp_path: Path, spoil: Callable[[Path, Authority], None], says: str
) -> None:
    folder = shutil.copytree(authority.folder_of("sandbox"), tmp_path / "sandbox")
    spoil(folder, stranger)
    with pytest.raises(BadCertificate, match=says):
        ServiceHost("sandbox", RpcConfig(tls_dir=str(folder)))


def test_a_certificate_that_has_ended_or_is_anothers_is_refused_at_start(authority: Authority, tmp_path: Path) -> None:
    ended = shutil.copytree(authority.folder_of("ended", days=-1), tmp_path / "ended")
    with pytest.raises(BadCertificate, match="certificate has expired.*be valid today"):
        Identity(ended)
    with pytest.raises(BadCertificate, match="is that of gateway, not of sandbox; issue one"):
        ServiceHost("sandbox", RpcConfig(tls_dir=str(authority.folder_of("gateway"))))


def test_a_real_process_serves_with_its_certificate_and_ends_with_a_reason_without(authority: Authority) -> None:
    """The probe beside it speaks TLS as well; a process with another's certificate says so and ends with 2."""
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    settings = environment({"SMELT_RPC_LISTEN": listen, "SMELT_SANDBOX_LEVEL": "confined"})
    command = [sys.executable, "-m", "services.sandbox"]
    wrong = settings | {"SMELT_RPC_TLS_DIR": str(authority.folder_of("gateway"))}
    ended = subprocess.run(command, env=wrong, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2 and "BAD_CERTIFICATE" in ended.stdout and "not of sandbox" in ended.stdout
    right = settings | {"SMELT_RPC_TLS_DIR": str(authority.folder_of("sandbox"))}
    with subprocess.Popen(command, env=right, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            identity = authority.identity("sandbox")
            while not health.is_serving(listen, identity):
                assert process.poll() is None
            assert not health.is_serving(listen)
        finally:
            process.kill()
