"""What runs on one machine: two servers, five services and the gateway; each with its command and its environment.

Every environment is built from nothing: PATH, folders below the stack's home, the settings of this process alone, and
what the user set for it (`SMELT_<SERVICE>_*`, `SMELT_RPC_*`, `OTEL_*`). Only the importer sees the hub's settings.
The sandbox, which runs foreign code, gets neither platform credentials nor headers that may hold a telemetry token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.stack.state import S3_USERS, SERVICES, StackState
from smeltkit import limits, servers
from smeltkit.blobs.access import OPERATOR
from smeltkit.config import PlatformConfig
from smeltkit.servers import Credentials

_NETWORK = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One process to run: `folder` is its working directory, `address` what its health is asked at."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    address: str
    ports: tuple[int, ...]


def platform_config(state: StackState, credentials: Mapping[str, Credentials], user: str = OPERATOR) -> PlatformConfig:
    """How `user` reaches the stack's NATS and S3: a service, or whoever works it."""
    keys = credentials[f"s3-{user}" if user in S3_USERS else "s3"]
    return PlatformConfig(
        nats_url=f"nats://{state.address('nats')}",
        nats_user=credentials["nats"].user,
        nats_password=credentials["nats"].secret,
        s3_endpoint=state.address("s3"),
        s3_access_key=keys.user,
        s3_secret_key=keys.secret,
    )


def server_components(home: Path, state: StackState, credentials: Mapping[str, Credentials]) -> list[Component]:
    """NATS and the S3 server; writes their configuration below `home`."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(home / "tmp"), "TMPDIR": str(home / "tmp")}
    s3_ports = [state.ports[part] for part in servers.S3_PARTS]
    nats = servers.nats_command(home / "nats", state.ports["nats"], credentials["nats"])
    users = {user: credentials[f"s3-{user}"] for user in S3_USERS}
    s3 = servers.s3_command(home / "s3", state.ports, credentials["s3"], users=users)
    return [
        Component(
            name="nats",
            command=tuple(nats),
            environment=base,
            folder=home / "nats",
            address=state.address("nats"),
            ports=(state.ports["nats"],),
        ),
        Component(
            name="s3",
            command=tuple(s3),
            environment=base,
            folder=home / "s3",
            address=state.address("s3"),
            ports=(*s3_ports, *(port + servers.GRPC_TWIN for port in s3_ports)),
        ),
    ]


def service_components(
    home: Path, state: StackState, credentials: Mapping[str, Credentials], user: Mapping[str, str]
) -> list[Component]:
    """The five services and the gateway; `user` is the environment of whoever starts the stack."""
    return [
        Component(
            name=name,
            command=(sys.executable, "-m", "gateway" if name == "gateway" else f"services.{name}"),
            environment=_environment(name, home, state, platform_config(state, credentials, name), user),
            folder=home / "run" / name,
            address=state.address(name),
            ports=(state.ports[name], state.ports["gateway_http"]) if name == "gateway" else (state.ports[name],),
        )
        for name in (*SERVICES, "gateway")
    ]


def _environment(
    name: str, home: Path, state: StackState, platform: PlatformConfig, user: Mapping[str, str]
) -> dict[str, str]:
    own, folder = f"SMELT_{name.upper()}_", home / "run" / name
    environment = {
        "PATH": user.get("PATH", "/usr/bin:/bin"),
        "HOME": str(folder),
        "TMPDIR": str(home / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }
    environment |= {key: _absolute(key, value) for key, value in user.items() if _is_passed(name, key)}
    environment |= {
        "SMELT_RPC_LISTEN": state.address(name),
        "SMELT_RPC_DRAIN_GRACE_S": user.get("SMELT_RPC_DRAIN_GRACE_S", f"{limits.STACK_DRAIN_GRACE_S:g}"),
        "SMELT_TELEMETRY_TRACE_DIR": str(home / "traces"),
    }
    if own_certificate := environment.get("SMELT_RPC_TLS_DIR"):
        environment["SMELT_RPC_TLS_DIR"] = str(Path(own_certificate).parent / name)
    if name in S3_USERS:
        environment |= {f"SMELT_PLATFORM_{key.upper()}": _text(value) for key, value in asdict(platform).items()}
    settings: dict[str, str] = {}
    if name in ("importer", "trainer", "inference"):
        environment.setdefault(f"{own}CACHE_DIR", str(home / "cache" / name))
    if name == "trainer":
        environment.setdefault(f"{own}TENSORBOARD_DIR", str(home / "tensorboard"))
    if name in ("importer", "trainer", "evaluator"):
        settings["INFERENCE_ADDRESS"] = state.address("inference")
    if name == "evaluator":
        settings["SANDBOX_ADDRESS"] = state.address("sandbox")
    if name == "gateway":
        settings |= {f"{service.upper()}_ADDRESS": state.address(service) for service in SERVICES}
        settings["HTTP_LISTEN"] = state.address("gateway_http")
    environment |= {own + key: value for key, value in settings.items()}
    if name == "importer":
        environment |= _hub_settings(home, user)
    return environment


def _is_passed(name: str, key: str) -> bool:
    if key == "OTEL_SERVICE_NAME" or (name == "sandbox" and key.startswith("OTEL_") and "HEADERS" in key):
        return False
    if name in ("importer", "evaluator") and key in _NETWORK:
        return True
    if name == "gateway" and key.startswith("SMELT_HTTP_"):
        return True
    return key.startswith((f"SMELT_{name.upper()}_", "SMELT_RPC_", "SMELT_TELEMETRY_", "OTEL_"))


def _absolute(key: str, value: str) -> str:
    """Paths as the user meant them: the process has another working directory."""
    is_path = key.startswith("SMELT_") and key.endswith(("_DIR", "_FILE")) and value
    return str(Path(value).absolute()) if is_path else value


def _hub_settings(home: Path, user: Mapping[str, str]) -> dict[str, str]:
    """The hub's cache goes below `home`; its token stays where `hf auth login` put it."""
    token = Path(user.get("HOME", "/")) / ".cache" / "huggingface" / "token"
    settings = {"HF_HOME": str(home / "cache" / "huggingface")}
    if token.is_file():
        settings["HF_TOKEN_PATH"] = str(token)
    return settings | {key: value for key, value in user.items() if key.startswith("HF_")}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
