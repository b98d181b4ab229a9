"""Clean-up of the store: what nothing leads to and nobody has stored lately is deleted, or only shown (R-112).

    roots      digests that names of the catalogue and records of jobs mention, and references of the store
    edges      a manifest leads to its files and to every digest in its description; an artifact that is kept keeps
               the artifacts about it (reports, probes)
    young      written, or stored again, since the cut-off: younger than the least age, or than the oldest job at work,
               whose output nothing leads to yet

Manifests go before their files, so a manifest that is stored has its files. Whoever stores what is there already makes
it young, and `ObjectStore.discard` sees that or is seen; so writers need no lock and lose nothing, on any store whose
reads see earlier writes. A name given to an old artifact that nothing led to may come too late for a clean-up at work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from smeltkit import limits
from smeltkit.blobs.store import BLOBS, MANIFESTS, REFS, TOUCHED, StoredObject, digest_of_key
from smeltkit.errors import BadRequest
from smeltkit.manifest import Manifest, canonical_json

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")
_ABOUT = re.compile(r"(?:probes|runs)/([0-9a-f]{64})/")


class Yard(Protocol):
    """A store as clean-up sees it; `smeltkit.blobs.objects.ObjectStore` is one."""

    def list_objects(self, kind: str) -> Iterator[StoredObject]:
        """Every object of a kind."""

    def discard(self, key: str, cut_off_s: float) -> bool:
        """Deletes an object unless it was written or stored again since `cut_off_s`; whether it did."""

    def get_manifest(self, digest: str) -> Manifest:
        """The manifest of a digest."""

    def get_ref(self, name: str) -> str | None:
        """What a reference points at."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What a clean-up found: objects in the order in which they may go, and what stays."""

    objects: tuple[StoredObject, ...]
    kept: int
    """Blobs and manifests that something leads to, or that are young."""
    cut_off_s: float
    """What was used at or after this Unix time is young."""

    @property
    def size_bytes(self) -> int:
        """Bytes that deleting would free."""
        return sum(item.size_bytes for item in self.objects)


def digests_in(data: bytes) -> set[str]:
    """Every digest that `data` mentions in its text form; of messages and JSON alike."""
    return {match.decode() for match in _DIGEST.findall(data)}


def cut_off(now_s: float, age_min_s: float, begun_s: Iterable[float]) -> float:
    """The cut-off for a least age and the times at which jobs at work began; BadRequest below the least age allowed."""
    if age_min_s < limits.GARBAGE_AGE_MIN_S:
        raise BadRequest(
            f"age_min_s={age_min_s:g} must be at least {limits.GARBAGE_AGE_MIN_S:g}: work may be under way"
        )
    return min([now_s - age_min_s, *begun_s])


def find_garbage(yard: Yard, roots: Iterable[str], cut_off_s: float) -> Garbage:
    """What could be deleted; nothing is. `roots` are digests that are mentioned outside of the store."""
    manifests, blobs, refs = (list(yard.list_objects(kind)) for kind in (MANIFESTS, BLOBS, REFS))
    touched_s = {item.key.removeprefix(f"{TOUCHED}/"): item.modified_s for item in yard.list_objects(TOUCHED)}
    young = {
        item.key for item in (*manifests, *blobs) if max(item.modified_s, touched_s.get(item.key, 0.0)) >= cut_off_s
    }
    stored = {digest: item for item in manifests if (digest := digest_of_key(item.key)) is not None}
    targets = {item.key: yard.get_ref(item.key.removeprefix(f"{REFS}/")) for item in refs}
    begin = set(roots) | {digest for digest, item in stored.items() if item.key in young}
    begin |= {target for key, target in targets.items() if target is not None and _about(key) is None}
    reached = _reached(yard, begin, stored)
    about = {key: target for key, target in targets.items() if (owner := _about(key)) and owner in reached and target}
    reached |= _reached(yard, set(about.values()), stored)
    dead_refs = [
        item
        for item in refs
        if (owner := _about(item.key)) is not None and owner not in reached and item.modified_s < cut_off_s
    ]
    dead = [item for item in (*manifests, *blobs) if digest_of_key(item.key) not in reached and item.key not in young]
    kept = len(manifests) + len(blobs) - len(dead)
    return Garbage(objects=(*dead_refs, *dead), kept=kept, cut_off_s=cut_off_s)


def delete_garbage(yard: Yard, garbage: Garbage) -> list[StoredObject]:
    """Deletes what was found and is still old; what was deleted."""
    return [item for item in garbage.objects if yard.discard(item.key, garbage.cut_off_s)]


def _about(key: str) -> str | None:
    """The digest of the artifact that a reference is about; None for one that stands for itself."""
    match = _ABOUT.match(key.removeprefix(f"{REFS}/"))
    return f"sha256:{match[1]}" if match else None


def _reached(yard: Yard, begin: set[str], stored: dict[str, StoredObject]) -> set[str]:
    """Every digest that `begin` leads to, itself included."""
    content = {digest: yard.get_manifest(digest) for digest in stored}
    followers: dict[str, list[str]] = {}
    for digest, manifest in content.items():
        if manifest.subject:
            followers.setdefault(manifest.subject, []).append(digest)
    reached: set[str] = set()
    waiting = list(begin)
    while waiting:
        digest = waiting.pop()
        if digest in reached:
            continue
        reached.add(digest)
        waiting += followers.get(digest, [])
        if (found := content.get(digest)) is not None:
            waiting += (layer.digest for layer in found.layers)
            waiting += digests_in(canonical_json(dict(found.config)))
    return reached
