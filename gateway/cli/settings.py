"""Every setting that the command line and the gateway read: value, source and meaning."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from gateway.cli.prices import PriceConfig
from gateway.config import GatewayConfig
from gateway.http.config import HttpConfig
from smeltkit.config import BackupConfig, PlatformConfig, check_known, environment, smelt_home
from smeltkit.errors import BadConfig
from smeltkit.rpc.server import RpcConfig
from smeltkit.telemetry.setup import TelemetryConfig

_CONFIGS: tuple[tuple[str, type[Any]], ...] = (
    ("SMELT_RPC_", RpcConfig),
    ("SMELT_TELEMETRY_", TelemetryConfig),
    ("SMELT_PLATFORM_", PlatformConfig),
    ("SMELT_BACKUP_", BackupConfig),
    ("SMELT_GATEWAY_", GatewayConfig),
    ("SMELT_HTTP_", HttpConfig),
    ("SMELT_PRICE_", PriceConfig),
)

_SERVICES = [
    field.name.removesuffix("_address") for field in dataclasses.fields(GatewayConfig) if "_addr" in field.name
]
_PREFIXES = (*(prefix for prefix, _ in _CONFIGS), *(f"SMELT_{name.upper()}_" for name in _SERVICES), "SMELT_PROOF_")
_PLAIN = ("SMELT_GATEWAY", "SMELT_HOME", "SMELT_DATA")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One variable. `source` is environment, default or unset; the value of a secret is hidden."""

    variable: str
    value: str
    source: str
    meaning: str


def known_settings() -> list[Setting]:
    """The settings of the command line itself, then those of each part, in the order of their declaration."""
    environ = environment()
    own = [
        ("SMELT_GATEWAY", "", "host:port of the gateway to use; empty for the platform of this machine."),
        ("SMELT_HOME", str(smelt_home()), "Folder of the local platform's state."),
    ]
    settings = [_setting(variable, meaning, environ.get(variable), default) for variable, default, meaning in own]
    for prefix, config in _CONFIGS:
        texts = dict(meanings(config))
        for field in dataclasses.fields(config):
            variable = prefix + field.name.upper()
            given, default = environ.get(variable), _default(field)
            if not field.repr and (given or default):
                given, default = "(hidden)" if given else None, "(hidden)"
            settings.append(_setting(variable, texts.get(field.name, ""), given, default))
    return settings


def check_settings() -> None:
    """BadConfig for a variable of ours that nothing reads; services check their own when they are started."""
    for prefix, config in _CONFIGS:
        check_known(config, prefix, environment())
    for name in environment():
        if name.startswith("SMELT_") and name not in _PLAIN and not name.startswith(_PREFIXES):
            near = difflib.get_close_matches(f"{'_'.join(name.split('_')[:2])}_", _PREFIXES, n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]}*?" if near else f"; ours are {', '.join((*_PLAIN, *_PREFIXES))}*"
            raise BadConfig(f"{name} is set but nothing reads it{hint}")


def _setting(variable: str, meaning: str, given: str | None, default: str | None) -> Setting:
    source = "environment" if given is not None else "unset" if default is None else "default"
    return Setting(
        variable=variable, value=given if given is not None else default or "", source=source, meaning=meaning
    )


def _default(field: dataclasses.Field[Any]) -> str | None:
    return None if field.default is dataclasses.MISSING else str(field.default)


def meanings(config: type[Any]) -> Iterator[tuple[str, str]]:
    """Each field with the text that stands under it."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(declared, ast.ClassDef)
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            yield field.target.id, " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
