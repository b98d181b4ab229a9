"""Settings: frozen dataclasses filled from the environment, every value checked, every key read.

The only module that looks at the environment. A service declares a keyword-only frozen dataclass beside its owner and
calls `from_environment(Config, "SMELT_IMPORTER_")`: field `cache_dir` is read from `SMELT_IMPORTER_CACHE_DIR`. A
variable with the prefix that no field reads is BadConfig with a did-you-mean; range checks belong in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from smeltkit.errors import BadConfig

T = TypeVar("T")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def from_environment(cls: type[T], prefix: str, environ: Mapping[str, str] | None = None, **overrides: Any) -> T:
    """A `cls` whose fields come from `overrides`, else `environ` (default: the process's), else their defaults."""
    source = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = _fields_of(cls, prefix)
    check_known(cls, prefix, source)
    values = dict(overrides)
    for key, field in fields.items():
        if field.name not in values and key in source:
            values[field.name] = parse_value(source[key], hints[field.name], key)
    missing = [key for key, field in fields.items() if field.name not in values and not _has_default(field)]
    if missing:
        raise BadConfig(f"{', '.join(missing)} must be set")
    try:
        return cls(**values)
    except BadConfig as error:
        raise BadConfig(f"{prefix}*: {error.message}") from error


def check_known(cls: type[Any], prefix: str, environ: Mapping[str, str]) -> None:
    """BadConfig, with a did-you-mean, for a variable of `environ` with the prefix that no field of `cls` reads."""
    fields = _fields_of(cls, prefix)
    for key in environ:
        if key.startswith(prefix) and key not in fields:
            near = difflib.get_close_matches(key, list(fields), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise BadConfig(f"{key} is set but nothing reads it{hint}")


def parse_value(text: str, hint: Any, key: str) -> Any:
    """`text` as the type `hint`; BadConfig names `key`, the text and the type it should have."""
    if isinstance(hint, types.UnionType):
        if text == "" and type(None) in hint.__args__:
            return None
        hint = next(arg for arg in hint.__args__ if arg is not type(None))
    if hint is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise BadConfig(f"{key}={text!r} is no truth value; use true or false")
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return hint(text)
    except ValueError as error:
        raise BadConfig(f"{key}={text!r} is not a valid {getattr(hint, '__name__', hint)}") from error


def environment(names: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy of the process's environment with `names` added: what a child process starts with."""
    return {**os.environ, **(names or {})}


def default_environment(names: Mapping[str, str]) -> None:
    """Sets each variable that is not set: for libraries that read the environment once, when they are loaded."""
    for name, value in names.items():
        os.environ.setdefault(name, value)


def smelt_home() -> Path:
    """The folder of the local platform's state: `SMELT_HOME`, else `.smelt` in the working directory."""
    return Path(os.environ.get("SMELT_HOME") or ".smelt").resolve()


def _fields_of(cls: type[Any], prefix: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of `cls` by the variables that fill them."""
    return {prefix + field.name.upper(): field for field in dataclasses.fields(cls)}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformConfig:
    """Where NATS and the object store are: prefix `SMELT_PLATFORM_`."""

    nats_url: str
    """NATS server to connect to, e.g. nats://127.0.0.1:4222; several are comma-separated."""
    nats_user: str = ""
    """User name for NATS; empty for none."""
    nats_password: str = dataclasses.field(default="", repr=False)
    """Password for NATS."""
    nats_password_file: str = ""
    """File with the password instead, read again for every connection; or empty."""
    nats_ca_file: str = ""
    """PEM file of the authorities that vouch for NATS: connections are encrypted from the first byte; or empty."""
    nats_replicas: int = 1
    """Copies of each stream and bucket that the topology asks for, 1 to 5; 3 in a cluster of three servers."""
    inference_start_s: float = 0.0
    """Seconds that callers of inference wait for a replica where none runs; 0 where one always does."""
    s3_endpoint: str
    """Host and port of the S3 API, e.g. 127.0.0.1:9000."""
    s3_access_key: str = ""
    """Access key id."""
    s3_secret_key: str = dataclasses.field(default="", repr=False)
    """Secret access key."""
    s3_keys_dir: str = ""
    """Folder with the files access-key and secret-key instead, read again when they change; or empty."""
    s3_bucket: str = "smelt"
    """Bucket of all artifacts, 3 to 63 characters."""
    s3_secure: bool = False
    """Whether the endpoint speaks TLS."""
    s3_ca_file: str = ""
    """PEM file of the authorities that vouch for the endpoint; empty for those that the system trusts."""

    def __post_init__(self) -> None:
        if self.nats_password and self.nats_password_file:
            raise BadConfig("nats_password and nats_password_file are both set; leave one out")
        if self.s3_endpoint and bool(self.s3_keys_dir) == bool(self.s3_access_key and self.s3_secret_key):
            raise BadConfig("s3_access_key and s3_secret_key must be set, or else s3_keys_dir alone")
        if self.s3_ca_file and not self.s3_secure:
            raise BadConfig(f"s3_ca_file={self.s3_ca_file!r} has no effect: s3_secure is false")
        _check_endpoint(self.s3_endpoint)
        if not _BUCKET.fullmatch(self.s3_bucket):
            raise BadConfig(
                f"s3_bucket={self.s3_bucket!r} must have 3 to 63 characters: small letters, digits, dots and hyphens"
                " with a letter or digit first and last"
            )
        if not 1 <= self.nats_replicas <= 5:
            raise BadConfig(f"nats_replicas={self.nats_replicas} must be 1 to 5")
        if not 0 <= self.inference_start_s <= 3600:
            raise BadConfig(f"inference_start_s={self.inference_start_s:g} must be 0 to 3600")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackupConfig:
    """The S3 server of backups: prefix `SMELT_BACKUP_`. Whatever is not set is the platform's own."""

    s3_endpoint: str = ""
    """Host and port of the S3 API that keeps backups; empty for the platform's own server and keys."""
    s3_access_key: str = ""
    """Access key id there."""
    s3_secret_key: str = dataclasses.field(default="", repr=False)
    """Secret access key there."""
    s3_keys_dir: str = ""
    """Folder with the files access-key and secret-key instead, read again when they change; or empty."""
    s3_secure: bool = False
    """Whether that endpoint speaks TLS."""
    s3_ca_file: str = ""
    """PEM file of the authorities that vouch for that endpoint; empty for those that the system trusts."""

    def __post_init__(self) -> None:
        if bool(self.s3_endpoint) != bool(self.s3_keys_dir or (self.s3_access_key and self.s3_secret_key)):
            raise BadConfig(
                "s3_endpoint must be set together with s3_access_key and s3_secret_key, or with s3_keys_dir"
            )
        _check_endpoint(self.s3_endpoint)

    def on(self, platform: PlatformConfig) -> PlatformConfig:
        """`platform` with the server of backups in place of its own."""
        return dataclasses.replace(platform, **dataclasses.asdict(self)) if self.s3_endpoint else platform


def _check_endpoint(endpoint: str) -> None:
    if "/" in endpoint:
        raise BadConfig(
            f"s3_endpoint={endpoint!r} must be HOST:PORT, without http:// or a path; s3_secure asks for TLS"
        )
