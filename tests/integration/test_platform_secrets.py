"""NATS and S3 behind TLS, and secrets that are replaced under running processes: on real servers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from smeltkit import limits, servers
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.config import PlatformConfig, environment
from smeltkit.errors import BadCertificate, BadConfig, BadToken, BusUnavailable, StoreDenied
from smeltkit.rpc.channel import call, open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.secret import Secret
from smeltkit.testing.certificates import Authority
from smeltkit.testing.rpc import Handlers
from smeltkit.testing.waiting import eventually

USER = "evaluator"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who vouches for the servers."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The certificate of an authority that vouches for nobody here."""
    return str(Authority(tmp_path_factory.mktemp("stranger")).folder_of("localhost") / "ca.crt")


@contextmanager
def nats(folder: Path, port: int, password: str, certificate: Path | None = None) -> Iterator[str]:
    """A NATS server on this port; its address."""
    text = f"host: 127.0.0.1\nport: {port}\nauthorization {{ user: {USER}, password: {password} }}\n"
    if certificate:
        text += f"tls {{ cert_file: {certificate}/tls.crt, key_file: {certificate}/tls.key, handshake_first: true }}\n"
    (folder / "nats.conf").write_text(text)
    command = [servers.find_executable("nats-server"), "--config", folder / "nats.conf"]
    with (folder / "nats.log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            servers.wait_until(lambda: servers.is_listening(port), "NATS")
            yield f"nats://localhost:{port}"
        finally:
            process.kill()


@contextmanager
def s3(folder: Path, port: int, key: str, secret: str, certificate: Path | None = None) -> Iterator[PlatformConfig]:
    """An S3 server on this port; settings that reach it, but for the keys."""
    command = [str(servers.find_executable("rclone")), "serve", "s3", "--config", os.devnull]
    command += ["--addr", f"localhost:{port}", "--auth-key", f"{key},{secret}"]
    command += ["--cert", f"{certificate}/tls.crt", "--key", f"{certificate}/tls.key"] if certificate else []
    (folder / "data" / "smelt").mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([*command, str(folder / "data")], stderr=subprocess.DEVNULL) as process:
        try:
            servers.wait_until(lambda: servers.is_listening(port), "S3")
            yield PlatformConfig(
                nats_url="", s3_endpoint=f"localhost:{port}", s3_access_key=key, s3_secret_key=secret,
                s3_secure=certificate is not None,
            )  # fmt: skip
        finally:
            process.kill()


def settings(url: str, **changes: str) -> PlatformConfig:
    return PlatformConfig(nats_url=url, nats_user=USER, s3_endpoint="", **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a server that refuses."""
    monkeypatch.setattr(limits, "BUS_CONNECT_TIMEOUT_S", 1.0)


@pytest.fixture
def port() -> int:
    return servers.free_ports(1)[0]


async def test_nats_is_met_behind_tls_and_a_foreign_authority_is_named(
    authority: Authority, stranger: str, tmp_path: Path, port: int
) -> None:
    certificate = authority.folder_of("localhost")
    with nats(tmp_path, port, "secret", certificate) as url:
        bus = await Bus.connect(
            settings(url, nats_password="secret", nats_ca_file=str(certificate / "ca.crt")), name="t"
        )
        assert bus.is_connected
        await bus.close()
        with pytest.raises(BadCertificate, match="no certificate that is trusted here"):
            await Bus.connect(settings(url, nats_password="secret", nats_ca_file=stranger), name="t")
        with pytest.raises(BusUnavailable):
            await Bus.connect(settings(url, nats_password="secret"), name="t")
    with pytest.raises(BadCertificate, match="must hold certificates"):
        await Bus.connect(settings(url, nats_ca_file=str(certificate / "tls.key")), name="t")


async def test_a_server_that_offers_no_tls_never_hears_the_password(authority: Authority, port: int) -> None:
    """The greeting of NATS is in clear, and whoever is between could make it say that TLS is not wanted."""
    heard = b""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"auth_required":true}\r\n')
        heard += await reader.read(4096)
        writer.close()

    ca_file = str(authority.folder_of("localhost") / "ca.crt")
    async with await asyncio.start_server(listen, "127.0.0.1", port):
        with pytest.raises((BadCertificate, BusUnavailable)):
            await Bus.connect(
                settings(f"nats://localhost:{port}", nats_password="secret", nats_ca_file=ca_file), name="t"
            )
    assert heard and b"CONNECT" not in heard and b"secret" not in heard


async def test_a_server_that_speaks_no_tls_is_told_from_one_that_is_not_trusted(
    authority: Authority, tmp_path: Path, port: int
) -> None:
    ca_file = str(authority.folder_of("localhost") / "ca.crt")
    words = "does not speak TLS from the first byte; leave .*_NATS_CA_FILE empty"
    with nats(tmp_path, port, "secret") as url, pytest.raises(BadCertificate, match=words):
        await Bus.connect(settings(url, nats_password="secret", nats_ca_file=ca_file), name="t")


async def test_a_password_is_replaced_under_a_running_process(tmp_path: Path, port: int) -> None:
    path = tmp_path / "password"
    path.write_text("first\n")
    with nats(tmp_path, port, "first") as url:
        bus = await Bus.connect(settings(url, nats_password_file=str(path)), name="t")
    await eventually(lambda: not bus.is_connected)
    path.write_text("second\n")
    with nats(tmp_path, port, "second"):
        await eventually(lambda: bus.is_connected, timeout_s=20)
        await bus._client.flush()
    await bus.close()


def test_s3_is_met_behind_tls_and_a_foreign_authority_is_named(
    authority: Authority, stranger: str, tmp_path: Path, port: int
) -> None:
    certificate = authority.folder_of("localhost")
    with s3(tmp_path, port, "smelt", "secret", certificate) as config:
        store = S3Store(replace(config, s3_ca_file=str(certificate / "ca.crt")))
        store.prove()
        assert store.get_bytes(store.put_bytes(b"behind TLS")) == b"behind TLS"
        for foreign in (replace(config, s3_ca_file=stranger), config):
            with pytest.raises(BadCertificate, match="shows no certificate that this process trusts"):
                S3Store(foreign).prove()


def test_keys_of_the_store_are_replaced_under_a_running_process(tmp_path: Path, port: int) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "access-key").write_text("smelt")
    (keys / "secret-key").write_text("first")
    with s3(tmp_path, port, "smelt", "first") as config:
        store = S3Store(replace(config, s3_access_key="", s3_secret_key="", s3_keys_dir=str(keys)))
        digest = store.put_bytes(b"kept")
    (keys / "access-key").write_text("smelt-2")
    with s3(tmp_path, port, "smelt-2", "second"):
        with pytest.raises(StoreDenied):
            store.prove()
        (keys / "secret-key").write_text("second")
        store.prove()
        assert store.get_bytes(digest) == b"kept"


async def test_the_token_between_services_is_replaced_without_a_refused_call(tmp_path: Path) -> None:
    """New second, then first, then alone: at each step both sides understand each other."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.write_text("old\n")

    async def answer(request: bytes, context: object) -> bytes:
        return b""

    host = ServiceHost("importer", RpcConfig(token_file=str(theirs)))
    method = "/smelt.job.v1.JobService/GetJob"
    host.add_generic(Handlers({method: grpc.unary_unary_rpc_method_handler(answer)}))
    host.set_ready(True)
    await host.start()
    try:
        async with open_channel(host.address, token=Secret(file=str(ours)), is_retrying=False) as channel:
            ask = channel.unary_unary(method)
            for path, text in (
                (theirs, "old\nnew\n"), (ours, "old\nnew\n"), (ours, "new\nold\n"), (theirs, "new\n"), (ours, "new\n"),
            ):  # fmt: skip
                path.write_text(text)
                assert await call(ask, b"", timeout_s=5) == b""
            ours.write_text("old\n")
            with pytest.raises(BadToken):
                await call(ask, b"", timeout_s=5)
    finally:
        await host.stop()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nats_password": "a", "nats_password_file": "b"}, "leave one out"),
        ({"s3_endpoint": "h:1"}, "must be set, or else s3_keys_dir"),
        ({"s3_endpoint": "h:1", "s3_access_key": "a", "s3_secret_key": "b", "s3_keys_dir": "c"}, "s3_keys_dir alone"),
        ({"s3_endpoint": "", "s3_ca_file": "ca.crt"}, "has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, str], named: str) -> None:
    with pytest.raises(BadConfig, match=named):
        PlatformConfig(**{"nats_url": "nats://h", "s3_endpoint": "", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["nats", "s3", "keys"])
def test_a_service_does_not_start_with_what_its_servers_refuse(
    authority: Authority, stranger: str, tmp_path: Path, wrong: str
) -> None:
    """A reason and a remedy in its log, at once, instead of a failure in the first job."""
    nats_port, s3_port = servers.free_ports(2)
    certificate = authority.folder_of("localhost")
    right = str(certificate / "ca.crt")
    with (
        nats(tmp_path, nats_port, "secret", certificate) as url,
        s3(tmp_path, s3_port, "smelt", "secret", certificate) as found,
    ):
        names = {
            "SMELT_PLATFORM_NATS_URL": url,
            "SMELT_PLATFORM_NATS_USER": USER,
            "SMELT_PLATFORM_NATS_PASSWORD": "secret",
            "SMELT_PLATFORM_NATS_CA_FILE": stranger if wrong == "nats" else right,
            "SMELT_PLATFORM_S3_ENDPOINT": found.s3_endpoint,
            "SMELT_PLATFORM_S3_ACCESS_KEY": "smelt",
            "SMELT_PLATFORM_S3_SECRET_KEY": "wrong" if wrong == "keys" else "secret",
            "SMELT_PLATFORM_S3_SECURE": "true",
            "SMELT_PLATFORM_S3_CA_FILE": stranger if wrong == "s3" else right,
            "SMELT_EVALUATOR_INFERENCE_ADDRESS": "127.0.0.1:1",
            "SMELT_EVALUATOR_SANDBOX_ADDRESS": "127.0.0.1:1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "services.evaluator"], env=environment(names), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    reason = "STORE_DENIED" if wrong == "keys" else "BAD_CERTIFICATE"
    assert done.returncode != 0 and f'"reason": "{reason}"' in done.stdout, done.stdout + done.stderr
