"""Who may do what in the object store: by service, then by the beginning of the key. What is not here is refused.

`python -m smeltkit.blobs.access SERVICE [BUCKET]` prints the policy that any S3 server takes for the service's key.
Each service has a key of its own; the sandbox has none.

Not told apart: who wrote what under one beginning, e.g. one service's blobs from another's (readers check digests, so a
blob written over is found out and not believed); and names of objects, since S3 answers a question for an object that
is not there only to those who may list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from smeltkit.blobs.store import BLOBS, DOOMED, MANIFESTS, REFS, TOUCHED
from smeltkit.errors import BadRequest

READ, WRITE, DELETE = "read", "write", "delete"
ACTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        READ: ("s3:GetObject",),
        WRITE: ("s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"),
        DELETE: ("s3:DeleteObject",),
    }
)
"""What each right is called by S3."""
PROBES, RUNS, EVALUATIONS = f"{REFS}/probes", f"{REFS}/runs", f"{REFS}/evaluations"
_ALL = frozenset({READ, WRITE, DELETE})
_BOTH = frozenset({READ, WRITE})
_READ, _WRITE = frozenset({READ}), frozenset({WRITE})


def _stored_again(*kinds: str) -> dict[str, frozenset[str]]:
    """What a writer needs to make young what is there, and to see whether a clean-up is at it."""
    return {f"{TOUCHED}/{kind}": _WRITE for kind in kinds} | {f"{DOOMED}/{kind}": _READ for kind in kinds}


OPERATOR: Final = "operator"
"""Whoever works the platform from outside: makes the bucket, cleans up, backs up and restores."""
BACKUP: Final = "backup"
"""Who takes backups by the clock: reads all, writes nothing. Only where that is wanted is there a key for it."""
MAY: Final[Mapping[str, Mapping[str, frozenset[str]]]] = MappingProxyType(
    {
        OPERATOR: {"": _ALL},
        "gateway": {BLOBS: _ALL, MANIFESTS: _READ, **_stored_again(BLOBS)},
        "importer": {BLOBS: _ALL, MANIFESTS: _BOTH, PROBES: _READ, **_stored_again(BLOBS, MANIFESTS)},
        "trainer": {BLOBS: _ALL, MANIFESTS: _BOTH, PROBES: _READ, RUNS: _BOTH, **_stored_again(BLOBS, MANIFESTS)},
        "inference": {BLOBS: _READ, MANIFESTS: _BOTH, PROBES: _BOTH, **_stored_again(MANIFESTS)},
        BACKUP: {BLOBS: _READ, MANIFESTS: _READ, REFS: _READ},
        "evaluator": {BLOBS: _BOTH, MANIFESTS: _BOTH, EVALUATIONS: _BOTH, **_stored_again(BLOBS, MANIFESTS)},
    }
)
"""By user, then by beginning of the key. Who writes files also deletes blobs: those that changed while being sent."""

SERVICES: Final = tuple(user for user in MAY if user not in (OPERATOR, BACKUP))
"""Who has a key on every platform, beside whoever works it."""


def may(user: str, right: str, key: str) -> bool:
    """Whether `user` has `right` (READ, WRITE or DELETE) on the object `key`."""
    return any(
        right in rights and (not begin or key.startswith(f"{begin}/")) for begin, rights in MAY.get(user, {}).items()
    )


def policy(user: str, bucket: str) -> dict[str, Any]:
    """The user's rights in AWS's policy language; BadRequest for a user that there is not."""
    if user not in MAY:
        raise BadRequest(f"{user!r} has no key for the object store; {', '.join(MAY)} have")
    resource = f"arn:aws:s3:::{bucket}"
    on_bucket = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    if user == OPERATOR:
        return _document([_allow(["s3:*"], [resource, f"{resource}/*"])])
    statements = [_allow(on_bucket, [resource])]
    for right, actions in ACTIONS.items():
        begins = [begin for begin, rights in MAY[user].items() if right in rights]
        statements.append(_allow(list(actions), [f"{resource}/{begin}/*" for begin in begins]))
    return _document([statement for statement in statements if statement["Resource"]])


def _allow(actions: list[str], resources: list[str]) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": resources}


def _document(statements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(policy(sys.argv[1], (sys.argv[2:] or ["smelt"])[0]), indent=2) + "\n")
