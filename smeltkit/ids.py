"""Identifiers: digests name bytes, names point at digests, request and job ids name work."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import BinaryIO

from smeltkit.errors import BadDigest, BadName

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHORT_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}(/[a-z0-9][a-z0-9._-]{0,95}){0,3}(:[a-z0-9][a-z0-9._-]{0,63})?")
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_READ_BYTES = 1 << 20


def check_digest(text: str) -> str:
    """`text` itself if it is a digest `sha256:<64 hex>`, else BadDigest."""
    if not _DIGEST.fullmatch(text):
        raise BadDigest(f"{text!r} is not a digest; write sha256: followed by 64 lower-case hex digits")
    return text


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest."""
    return _DIGEST.fullmatch(text) is not None


def digest_digits(text: str) -> str:
    """The digits of a shortened digest (6 to 64, `sha256:` before them or not); empty for any other text."""
    found = None if is_digest(text) else _SHORT_DIGEST.fullmatch(text)
    return found[1] if found else ""


def digest_bytes(data: bytes | memoryview) -> str:
    """The digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(file: BinaryIO) -> tuple[str, int]:
    """Digest and size in bytes of what is left to read in `file`."""
    hasher, size_bytes = hashlib.sha256(), 0
    while block := file.read(_READ_BYTES):
        hasher.update(block)
        size_bytes += len(block)
    return "sha256:" + hasher.hexdigest(), size_bytes


def check_name(text: str) -> str:
    """A catalogue name such as `ore-11m` or `team/ore-11m:v2`, with `:latest` added where no tag is given."""
    if not _NAME.fullmatch(text):
        raise BadName(
            f"{text!r} is not a name; use lower-case letters, digits, '.', '_', '-', up to 4 parts joined by '/'"
            " and an optional ':tag'"
        )
    return text if ":" in text else f"{text}:latest"


def new_id(prefix: str) -> str:
    """A fresh id `<prefix>-<time><random>`, sortable by creation time, 24 characters after the dash."""
    return _id(prefix, (int(time.time() * 1000) << 72) | secrets.randbits(72))


def derived_id(prefix: str, *parts: str) -> str:
    """The id of `parts`: equal parts give the same id, others another one. Same form as `new_id`, not sortable."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return _id(prefix, int.from_bytes(hashlib.sha256(text.encode()).digest()[:15], "big"))


def _id(prefix: str, value: int) -> str:
    digits = []
    for _ in range(24):
        value, digit = divmod(value, 32)
        digits.append(_CROCKFORD[digit])
    return f"{prefix}-{''.join(reversed(digits))}"
