"""API keys: which tenant may use the edge, and for what. Only hashes are stored; all are compared, in constant time.

A file has one key a line, `TENANT sha256:HEX`, then optionally `tokens=COUNT/SECONDS` and `models=NAME,NAME`. A tenant
may have several keys, so that a new one can be handed out before the old one goes; what holds for the tenant stands on
one of its lines. The file is read again when it changes, and kept as it was while what it holds is wrong.

A key is a long random text, so a plain SHA-256 of it cannot be searched for; words chosen by people are no keys.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadApiKey, BadConfig, BadName, KeyDenied
from smeltkit.ids import check_name, is_digest

_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+(sha256:[0-9a-f]{64})((?:\s+[a-z]+=\S+)*)")
_TOKENS = re.compile(r"([1-9][0-9]{0,14})/([1-9][0-9]{0,7})")


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Whoever holds a key. Without a name: everybody, where no keys are set."""

    name: str = ""
    tokens_max: int = 0
    """Tokens, read and generated, that may be used in a window; 0 for no bound."""
    window_s: int = 0
    """Length of the window in seconds; windows begin at multiples of it in Unix time."""
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
        self._follow()
        if not self._tenants:
            return EVERYBODY
        scheme, _, key = authorization.partition(" ")
        given, holder = hash_key(key.strip()), EVERYBODY
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(given, known):
                holder = tenant
        if scheme.lower() != "bearer" or holder is EVERYBODY:
            raise BadApiKey("a valid API key is required: send it as 'Authorization: Bearer KEY'")
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
                f"api_keys_file line {number} must be TENANT sha256:HEX [tokens=COUNT/SECONDS] [models=NAME,NAME] "
                "with a key not used before"
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
    tokens = _TOKENS.fullmatch(values.get("tokens", "1/1"))
    if set(values) - {"tokens", "models"} or len(values) != len(options) or tokens is None:
        raise BadConfig(
            f"api_keys_file line {number}: {' '.join(options)} must be tokens=COUNT/SECONDS, models=NAME,NAME or both"
        )
    try:
        models = (
            frozenset(_normal(model) for model in values["models"].split(",")) if "models" in values else frozenset()
        )
    except BadName as error:
        raise BadConfig(f"api_keys_file line {number}: {error}") from error
    count, window_s = (int(tokens[1]), int(tokens[2])) if "tokens" in values else (0, 0)
    return Tenant(name=name, tokens_max=count, window_s=window_s, models=models)


def _normal(reference: str) -> str:
    """A reference with its tag. BadName."""
    return reference if is_digest(reference) else check_name(reference)
