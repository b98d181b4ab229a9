"""Which isolation this host gives: layers probed by doing, the level that follows, and the remedy for the rest."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.sandbox.policy import Level
from services.sandbox.supervisor.zygote import FLAGS
from smeltkit.errors import InternalError, IsolationTooWeak

_TIMEOUT_S: Final = 30
_BOOT: Final = "import sys; sys.path.insert(0, sys.argv.pop()); from services.sandbox.kernel.probes import main; main()"
_NAMESPACES: Final = ("user-namespace", "namespaces", "nested-pid-namespace", "root")
_ALWAYS: Final = ("seccomp", "capabilities", "pidfd")
NEEDED: Final[dict[Level, tuple[str, ...]]] = {
    Level.JAIL: (*_NAMESPACES, *_ALWAYS, "landlock", "own-uids", "cgroup"),
    Level.ROOTLESS: (*_NAMESPACES, *_ALWAYS),
    Level.CONFINED: (*_ALWAYS, "landlock"),
    Level.GUEST_KERNEL: (*_ALWAYS, "guest-kernel"),
}
"""Layers that each level stands on. Under a guest kernel slots are built as at the best other level, or as confined
without Landlock where not even that is reached: there the guest kernel is the wall."""
_REMEDIES: Final = {
    "user-namespace": "set sysctl user.max_user_namespaces above 0; on Ubuntu 24.04 and later add an AppArmor profile"
    " with `userns,`; in a pod use the seccomp profile shipped for it",
    "namespaces": "allow unshare and setns in the container's seccomp profile",
    "nested-pid-namespace": "allow setns on the own pid namespace in the container's seccomp profile",
    "root": "allow mount and pivot_root in the container's seccomp and AppArmor profiles",
    "seccomp": "use a kernel with CONFIG_SECCOMP_FILTER",
    "pidfd": "use a kernel of 5.3 or later, or a guest kernel that has pidfd_open",
    "landlock": "use a kernel of 5.13 or later with landlock in its lsm= list",
    "capabilities": "run without a supervisor that filters capset",
    "own-uids": "run the service as root, so that every slot gets host uids of its own",
    "guest-kernel": "run the pod with a RuntimeClass for gVisor or Kata",
    "cgroup": "run as root, or as a systemd service with Delegate=memory pids",
}


@dataclass(frozen=True)
class Layer:
    """One layer on this host."""

    name: str
    error: str = ""
    """What refused it: errno's name and the message; empty if it works."""
    remedy: str = ""

    @property
    def is_present(self) -> bool:
        """Whether the layer works."""
        return not self.error


@dataclass(frozen=True)
class Isolation:
    """What was found: layers, the best level they allow (None for none), and as which level slots are built."""

    layers: tuple[Layer, ...]
    level: Level | None
    built_as: Level = Level.CONFINED

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the layers that do not work; a guest kernel is a level of its own and never missing from another."""
        absent = (layer.name for layer in self.layers if not layer.is_present)
        return tuple(name for name in absent if name != "guest-kernel")

    def has(self, name: str) -> bool:
        """Whether the layer works."""
        return name not in self.missing


def probe(uid_base: int, ceiling: Level = Level.GUEST_KERNEL) -> Isolation:
    """Probes this host; `ceiling` is the best level to report, for hosts that could do more."""
    root = str(Path(__file__).resolve().parents[2])
    command = [os.path.realpath(sys.executable), *FLAGS, "-c", _BOOT, str(uid_base), root]
    found = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, env={}, timeout=_TIMEOUT_S, check=False
    )
    if found.returncode:
        raise InternalError(f"the probes did not run: {found.stderr[-500:]!r}")
    return assess(json.loads(found.stdout), ceiling)


def assess(answers: dict[str, list[object] | None], ceiling: Level = Level.GUEST_KERNEL) -> Isolation:
    """The isolation behind the probes' answers."""
    layers = tuple(_layer(name, answer) for name, answer in answers.items())
    present = {layer.name for layer in layers if layer.is_present}
    reached = [level for level, needed in NEEDED.items() if present.issuperset(needed) and level <= ceiling]
    built_as = max((level for level in reached if level is not Level.GUEST_KERNEL), default=Level.CONFINED)
    return Isolation(layers, max(reached, default=None), built_as)


def require(isolation: Isolation, required: Level) -> Level:
    """The level reached; IsolationTooWeak below `required` names each missing layer, its error and the remedy."""
    if isolation.level is not None and isolation.level >= required:
        return isolation.level
    wanted = [layer for layer in isolation.layers if layer.name in NEEDED[required] and not layer.is_present]
    reasons = "; ".join(f"{layer.name}: {layer.error} (remedy: {layer.remedy})" for layer in wanted)
    reached = isolation.level or "no level"
    raise IsolationTooWeak(
        f"this host reaches {reached}, but {required} is required: {reasons}. "
        "Or accept a weaker level by setting SMELT_SANDBOX_LEVEL to its name",
        details={"required": str(required), "reached": str(reached), "missing": ",".join(isolation.missing)},
    )


def _layer(name: str, answer: list[object] | None) -> Layer:
    if answer is None:
        return Layer(name)
    number, message = answer
    code = errno.errorcode.get(number, str(number)) if isinstance(number, int) else ""
    return Layer(name, f"{code} {message}".strip(), _REMEDIES[name])
