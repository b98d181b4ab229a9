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
from smeltkit.bus.subjects import DEFAULT_TENANT, check_token
from smeltkit.errors import BadApiKey, BadConfig, BadName, BadRequest, KeyDenied
from smeltkit.hints import meant
from smeltkit.ids import check_name, is_digest

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
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
_MODELS: Final = "models"


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
        if not (words := line.partition("#")[0].split()):
            continue
        try:
            name, key, options = _parts(words)
            if key in holders:
                raise BadConfig(f"the key of {name} is that of an earlier line, of {holders[key]}; make each a new one")
            holders[key] = name
            if options or name not in tenants:
                if tenants.get(name, EVERYBODY) not in (EVERYBODY, Tenant(name=name)):
                    raise BadConfig(f"what {name} may do stands on an earlier line; put all of it there")
                tenants[name] = _tenant(name, options)
        except (BadConfig, BadName, BadRequest) as error:
            raise BadConfig(f"api_keys_file line {number}: {error.message}") from error
    if not 0 < len(holders) <= limits.HTTP_API_KEYS_MAX:
        raise BadConfig(f"api_keys_file holds {len(holders)} keys; allowed: 1 to {limits.HTTP_API_KEYS_MAX}")
    return {known: tenants[name] for known, name in holders.items()}


def _parts(words: list[str]) -> tuple[str, str, list[str]]:
    """Tenant, hash and options of a line. BadConfig, which does not show what may be a key."""
    name, key, *options = [*words, ""] if len(words) == 1 else words
    if not _NAME.fullmatch(name):
        raise BadConfig(f"the tenant {name[:80]!r} must be 1 to 64 letters, digits, dots, dashes and underscores")
    if name == DEFAULT_TENANT:
        raise BadConfig(f"{name} is what jobs of the platform itself go by; call the tenant something else")
    if not key.startswith("sha256:") or not is_digest(key):
        raise BadConfig(
            f"after {name} comes the hash of the key, sha256: and 64 digits of 0-9 and a-f, never the key"
            " (`printf %s KEY | sha256sum`)"
        )
    return name, key, options


def _tenant(name: str, options: list[str]) -> Tenant:
    """BadConfig, BadName or BadRequest for what an option says."""
    values: dict[str, str] = {}
    for option in options:
        what, _, value = option.partition("=")
        if what not in (*RESOURCES, _MODELS):
            raise BadConfig(f"{option[:80]!r} is no option of {name}; {meant(what, (*RESOURCES, _MODELS))}")
        if what in values:
            raise BadConfig(f"{what}= of {name} is given twice; leave one out")
        values[what] = value
    quotas: dict[str, Quota] = {what: _quota(what, values[what]) for what in RESOURCES if what in values}
    if BYTES in quotas:
        check_token(name, "tenant with bytes=")
    models = frozenset(map(_normal, values[_MODELS].split(","))) if _MODELS in values else frozenset()
    return Tenant(name=name, quotas=quotas, models=models)


def _quota(what: str, value: str) -> Quota:
    if (found := _QUOTA.fullmatch(value)) is None:
        raise BadConfig(
            f"{what}={value[:80]} must be {what}=COUNT/SECONDS in whole numbers, COUNT >= 1 and SECONDS >= 1"
        )
    return Quota(allowed=int(found[1]), window_s=int(found[2]))


def _normal(reference: str) -> str:
    """A reference with its tag. BadName."""
    return reference if is_digest(reference) else check_name(reference)
