"""Becomes what a restricted pod gives a container, then runs the sandbox service: `as_container.py jailing|plain`.

An ordinary user without any capability, no_new_privs, and the shipped seccomp profile; `plain` takes out the calls
that build jails, as a container runtime's own default does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from corpus_run import REPOSITORY, become_ordinary_user

from services.sandbox.jail.seal import drop_bounding_set
from services.sandbox.kernel import libc
from services.sandbox.kernel.container import JAILING, compiled
from services.sandbox.kernel.seccomp import read_groups

PROFILE = REPOSITORY / "deploy" / "sandbox" / "seccomp.json"


def main() -> None:
    """Never returns."""
    profile = json.loads(Path(PROFILE).read_text())
    if sys.argv[1] == "plain":
        without = set(read_groups("container.txt")[JAILING])
        for entry in profile["syscalls"]:
            entry["names"] = [name for name in entry["names"] if name not in without]
    program = compiled(profile)
    if os.geteuid() == 0:
        drop_bounding_set()
        become_ordinary_user()
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.install_filter(program)
    os.chdir(REPOSITORY)
    os.execv(sys.executable, [sys.executable, "-m", "services.sandbox"])


if __name__ == "__main__":
    main()
