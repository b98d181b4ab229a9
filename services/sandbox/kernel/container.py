"""The seccomp profile of a container that runs this service: `python -m services.sandbox.kernel.container` prints it.

It lets pass what jails need and what the service needs to build them, without any capability. `deploy/sandbox` holds a
copy. The group `jailing` is what a container runtime's own default refuses to a container without capabilities: without
it the service still starts, at the level `confined`.
"""

from __future__ import annotations

import errno
import json
import sys
from typing import Any, Final

from services.sandbox.kernel.numbers import AUDIT_ARCHITECTURES
from services.sandbox.kernel.seccomp import ERRNO, allowed_groups, assemble, read_groups

JAILING: Final = "jailing"
_ARCHITECTURES: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def container_calls(*, can_jail: bool = True) -> list[str]:
    """The calls that pass, sorted; without those that build jails unless `can_jail`."""
    groups = {**read_groups("container.txt"), **allowed_groups()}
    return sorted({name for group, names in groups.items() if can_jail or group != JAILING for name in names})


def container_profile() -> dict[str, Any]:
    """The profile as container runtimes read it. clone3 answers ENOSYS: its flags lie in memory, out of a filter's
    reach, and the C library then uses clone."""
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": [_ARCHITECTURES[name] for name in AUDIT_ARCHITECTURES],
        "syscalls": [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
            {"names": container_calls(), "action": "SCMP_ACT_ALLOW"},
        ],
    }


def compiled(profile: dict[str, Any]) -> bytes:
    """The profile as the filter that a container runtime would install."""
    allowed = [entry["names"] for entry in profile["syscalls"] if entry["action"] == "SCMP_ACT_ALLOW"]
    return assemble([name for names in allowed for name in names], [], otherwise=ERRNO | profile["defaultErrnoRet"])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(container_profile(), indent=2) + "\n")
