"""API keys: which tenant may come in, and for what. Only hashes are stored; all are compared, in constant time.

A file has one key a line, `TENANT sha256:HEX`, then optionally what may be used in a window of time,
`tokens=COUNT/SECONDS`, `bytes=COUNT/SECONDS` and `gpu=SECONDS/SECONDS`, and `models=NAME,NAME`. A tenant may have more
keys, so that a new one can be handed out before the old one goes; what holds for the tenant stands on one of its lines.
The file is read again when it changes, and kept as it was while what it holds is wrong.

A key opens the HTTP edge. The gRPC edge, where files are stored and jobs started, it opens only with `bytes=`: nobody
stores without a bound because a key was made for completions.

A key is a long random text, so a plain SHA-256 of it cannot be searched for; words chosen by people are no keys.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from smeltkit import limits
from smeltkit.bus.subjects import check_token
from smeltkit.errors import BadApiKey, BadConfig, BadName, BadRequest, KeyDenied
from smeltkit.ids import check_name, is_digest

_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+(sha256:[0-9a-f]{64})((?:\s+[a-z]+=\S+)*)")
_QUOTA = re.compile(r"([1-9][0-9]{0,14})/([1-9][0-9]{0,7})")


TOKENS: Final = "tokens"
BYTES: Final = "bytes"
GPU: Final = "gpu"
RESOURCES: Final = (TOKENS, BYTES, GPU)
"""What may be bounded: tokens read and generated, bytes stored, seconds of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How much of a resource may be used in a window."""

    allowed: int
    window_s: int
    """Length of the window in seconds; windows begin at multiples of it in Unix time."""


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Whoever holds a key. Without a name: everybody, where no keys are set."""

    name: str = ""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """By resource; one that is not there is not bounded."""
    models: frozenset[str] = frozenset()
    """Names with tag, or digests, of the models that may be used; none named for all."""

    def check_model(self, reference: str) -> None:
        """KeyDenied unless the tenant may use the model of this name or digest, in these very words."""
        if not self.may_use(reference):
            shown = ", ".join(sorted(self.models))
            raise KeyDenied(
                f"the API key of {self.name} may not use {reference[:200]!r}; it may use {shown}",
                details={"field": "model"},
            )

    def may_use(self, reference: str) -> bool:
        """Whether `check_model` lets it pass."""
        return not self.models or _normal(reference) in self.models


EVERYBODY = Tenant()
_FORM = "tokens=COUNT/SECONDS, bytes=COUNT/SECONDS, gpu=SECONDS/SECONDS and models=NAME,NAME, each once at most"


def hash_key(key: str) -> str:
    """What stands for `key` in the file."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys that are let in; with none at all, everybody is."""

    def __init__(self, tenants: Mapping[str, Tenant], path: Path | None = None) -> None:
        """`tenants`: `hash_key` of each key to its holder; `path`: the file to follow."""
        self._tenants, self._path = dict(tenants), path
        self._stamp = _stamp_of(path)

    @classmethod
    def from_file(cls, path: str) -> ApiKeys:
        """The keys of a file, none without a path. BadConfig names a line."""
        return cls(_read(Path(path)), Path(path)) if path else cls({})

    def check(self, authorization: str) -> Tenant:
        """Whoever sent this `Authorization` header; BadApiKey unless it is somebody."""
        scheme, _, key = authorization.partition(" ")
        holder = self._holder(key.strip())
        if not self._tenants:
            return EVERYBODY
        if scheme.lower() != "bearer" or holder is EVERYBODY:
            raise BadApiKey("a valid API key is required: send it as 'Authorization: Bearer KEY'")
        return holder

    def holder_at_grpc(self, key: str) -> str:
        """Name of the tenant whose key this is, "" for nobody's; KeyDenied if it is for completions alone."""
        holder = self._holder(key)
        if holder is not EVERYBODY and BYTES not in holder.quotas:
            raise KeyDenied(
                f"the API key of {holder.name} is for completions at the HTTP edge; to store files and start jobs it"
                " needs bytes=COUNT/SECONDS on its line in the file of keys"
            )
        return holder.name

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name, if the file has one."""
        return next((one for one in self.tenants() if one.name == name), None)

    def tenants(self) -> list[Tenant]:
        """All that are in the file, by name."""
        self._follow()
        return sorted({tenant.name: tenant for tenant in self._tenants.values()}.values(), key=lambda one: one.name)

    def _holder(self, key: str) -> Tenant:
        """Whose key it is; every one is compared."""
        self._follow()
        given, holder = hash_key(key), EVERYBODY
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(given, known):
                holder = tenant
        return holder

    def _follow(self) -> None:
        if self._path is None or (stamp := _stamp_of(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tenants = _read(self._path)
            _LOG.info("API keys were read again", extra={"keys": len(self._tenants)})
        except BadConfig as error:
            _LOG.warning("the API keys in use are kept: %s", error)


def _stamp_of(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when the file is replaced, also behind a link; None without it."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path) -> dict[str, Tenant]:
    """Holder of each hash in the file; BadConfig names a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"api_keys_file {path} cannot be read: {error}") from error
    holders: dict[str, str] = {}
    tenants: dict[str, Tenant] = {}
    for number, line in enumerate(lines, start=1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(text)
        if found is None or found[2] in holders:
            raise BadConfig(
                f"api_keys_file line {number} must be TENANT sha256:HEX with a key not used before, then {_FORM}"
            )
        holders[found[2]] = found[1]
        if found[3] or found[1] not in tenants:
            if tenants.get(found[1], EVERYBODY) not in (EVERYBODY, Tenant(name=found[1])):
                raise BadConfig(f"api_keys_file line {number}: what {found[1]} may do stands on an earlier line")
            tenants[found[1]] = _tenant(found[1], found[3].split(), number)
    if not 0 < len(holders) <= limits.HTTP_API_KEYS_MAX:
        raise BadConfig(f"api_keys_file holds {len(holders)} keys; allowed: 1 to {limits.HTTP_API_KEYS_MAX}")
    return {known: tenants[name] for known, name in holders.items()}


def _tenant(name: str, options: list[str], number: int) -> Tenant:
    values = dict(option.split("=", 1) for option in options)
    found = {name: _QUOTA.fullmatch(values[name]) for name in RESOURCES if name in values}
    quotas: dict[str, Quota] = {
        name: Quota(allowed=int(one[1]), window_s=int(one[2])) for name, one in found.items() if one
    }
    if set(values) - {*RESOURCES, "models"} or len(values) != len(options) or len(quotas) != len(found):
        raise BadConfig(f"api_keys_file line {number}: {' '.join(options)} must be {_FORM}")
    try:
        if BYTES in quotas:
            check_token(name, "tenant with bytes=")
        models = (
            frozenset(_normal(model) for model in values["models"].split(",")) if "models" in values else frozenset()
        )
    except (BadName, BadRequest) as error:
        raise BadConfig(f"api_keys_file line {number}: {error}") from error
    return Tenant(name=name, quotas=quotas, models=models)


def _normal(reference: str) -> str:
    """A reference with its tag. BadName."""
    return reference if is_digest(reference) else check_name(reference)
