"""Who SeaweedFS lets in, as the file that it reads: one key that may do all, and a key with its policy for each user.

`python -m smeltkit.blobs.identities FILE BUCKET` writes it where the server runs in a cluster, from ACCESS_KEY and
SECRET_KEY of whoever may do all, and ACCESS_KEY_<USER> and SECRET_KEY_<USER> of each user that has a policy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from smeltkit.blobs.access import SERVICES, policy
from smeltkit.config import environment
from smeltkit.errors import BadConfig

Keys: TypeAlias = tuple[str, str]
"""Access key and secret key."""
_EVERYTHING = ("Admin", "Read", "Write", "List", "Tagging")


def identities(keys: Keys, users: Mapping[str, Keys], bucket: str) -> dict[str, Any]:
    """The file's content: `keys` may do all, `users` may do in `bucket` what `smeltkit.blobs.access` says."""
    held = [_identity(keys, actions=_EVERYTHING), *(_identity(users[name], policyNames=(name,)) for name in users)]
    return {
        "identities": held,
        "policies": [{"name": name, "content": json.dumps(policy(name, bucket))} for name in users],
    }


def _identity(keys: Keys, **rights: tuple[str, ...]) -> dict[str, Any]:
    access, secret = keys
    return {"name": access, "credentials": [{"accessKey": access, "secretKey": secret}], **rights}


def _given(suffix: str) -> Keys:
    names = [f"{kind}_KEY{suffix}" for kind in ("ACCESS", "SECRET")]
    access, secret = (environment().get(name, "") for name in names)
    if not access or not secret:
        raise BadConfig(f"{' and '.join(names)} must be set")
    return access, secret


def main(path: str, bucket: str) -> None:
    """Writes the file for its owner only; BadConfig names a key that is missing."""
    users = {user: _given(f"_{user.upper()}") for user in SERVICES}
    target = Path(path)
    target.touch(mode=0o600)
    target.write_text(json.dumps(identities(_given(""), users, bucket)))


if __name__ == "__main__":
    main(*sys.argv[1:])
