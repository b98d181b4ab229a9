"""API keys: who may use the edge. Only hashes are stored, and comparing takes as long for a wrong key as for a right.

A key is a long random text, so a plain SHA-256 of it cannot be searched for; words chosen by people are no keys.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadApiKey, BadConfig

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+sha256:([0-9a-f]{64})")


def hash_key(key: str) -> str:
    """What stands for `key` in the file."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys that are let in; with none at all, everybody is."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        """`hashes`: name of the holder to `hash_key` of the key."""
        self._hashes = dict(hashes)

    @classmethod
    def from_file(cls, path: str) -> ApiKeys:
        """The keys of a file (`NAME sha256:HEX` lines, `#` comments), none without a path. BadConfig names a line."""
        if not path:
            return cls({})
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"api_keys_file {path} cannot be read: {error}") from error
        hashes: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            found = _LINE.fullmatch(text)
            if text and (found is None or found[1] in hashes):
                raise BadConfig(f"api_keys_file line {number} must be NAME sha256:HEX with a name not used before")
            if found:
                hashes[found[1]] = "sha256:" + found[2]
        if not 0 < len(hashes) <= limits.HTTP_API_KEYS_MAX:
            raise BadConfig(f"api_keys_file holds {len(hashes)} keys; allowed: 1 to {limits.HTTP_API_KEYS_MAX}")
        return cls(hashes)

    def check(self, authorization: str) -> str:
        """The name of whoever sent this `Authorization` header, empty if no keys are set; BadApiKey otherwise."""
        if not self._hashes:
            return ""
        scheme, _, key = authorization.partition(" ")
        given, holder = hash_key(key.strip()), ""
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                holder = name
        if scheme.lower() != "bearer" or not holder:
            raise BadApiKey("a valid API key is required: send it as 'Authorization: Bearer KEY'")
        return holder
