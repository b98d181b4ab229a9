"""Containers as a restricted pod would have them: an arbitrary user, a read-only root, no capability; run by podman."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.images.catalogue import Image
from smeltkit.errors import BadConfig, StackDown, Timeout
from smeltkit.rpc.health import is_serving

USER = 54321
"""A uid and gid that no image knows: clusters choose such ones."""
CACHE = "/var/cache/smelt"
START_TIMEOUT_S = 120.0
_RUNTIME = ("--runtime=runc", "--cgroup-manager=cgroupfs")
_BOUNDS = {"nofile": 1024, "nproc": 4096}
"""What podman would else raise, which takes a right that this machine's root need not have."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """One running container; `storage` are the options of podman that find it."""

    name: str
    image: Image
    address: str
    storage: tuple[str, ...]

    @classmethod
    def start(
        cls, image: Image, storage: Sequence[str], *, environment: Mapping[str, str], address: str, cache: Path
    ) -> Container:
        """Starts `image` on the host's network; only /tmp and the cache folder can be written."""
        if shutil.which("podman") is None or shutil.which("runc") is None:
            raise BadConfig("podman or runc is not installed; install them (Debian: apt-get install podman runc)")
        cache.mkdir(parents=True, exist_ok=True)
        shutil.chown(cache, USER, USER)
        made = cls(name=f"smelt-trial-{image.name}", image=image, address=address, storage=(*storage, *_RUNTIME))
        made._podman("rm", "--force", "--ignore", made.name)
        options = [f"--user={USER}:{USER}", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:size=1g,mode=1777"]
        options += [
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--network=host",
            *(f"--ulimit={name}={least}:{least}" for name, least in _BOUNDS.items()),
        ]
        options += ["--log-driver=k8s-file", f"--volume={cache}:{CACHE}", f"--name={made.name}"]
        options += [f"--env={name}={value}" for name, value in environment.items()]
        made._podman("run", "--detach", "--pull=never", *options, image.tag)
        return made

    def wait_serving(self) -> None:
        """Returns once its health service says so; StackDown with its log if it ended before, Timeout."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_serving(self.address):
            if not self._is_running():
                raise StackDown(f"{self.name} ended while it was starting: {self.log()[-1500:]}")
            if time.monotonic() > deadline:
                raise Timeout(f"{self.name} does not serve after {START_TIMEOUT_S:g} s: {self.log()[-1500:]}")
            time.sleep(0.1)

    def mistakes(self) -> list[str]:
        """What a running container breaks of the promises: user, read-only root, capabilities, its own health check."""
        found = []
        if (user := self.python("import os; print(os.getuid(), os.getgid())")) != f"{USER} {USER}":
            found.append(f"it runs as {user}")
        if self._execute("python", "-m", "smeltkit.rpc.health", self.address).returncode:
            found.append("its own health check fails")
        rights = self.python("print([l.split()[1] for l in open('/proc/1/status') if l.startswith('CapEff')][0])")
        if int(rights, 16):
            found.append(f"it holds capabilities {rights}")
        for place in ("/", "/opt/smelt", "/etc", "/var/tmp", "/run"):
            if self._execute("python", "-c", f"open('{place}/probe', 'w')").returncode == 0:
                found.append(f"{place} can be written")
        return found

    def stop(self, grace_s: int) -> tuple[int, float]:
        """Asks it to end by SIGTERM; exit code (137 if it had to be killed after `grace_s`) and the seconds it took."""
        began = time.monotonic()
        self._podman("stop", f"--time={grace_s}", self.name)
        took_s = time.monotonic() - began
        return int(self._podman("inspect", "--format={{.State.ExitCode}}", self.name)), took_s

    def remove(self) -> None:
        """Ends it at once if it still runs, and forgets it."""
        self._podman("rm", "--force", "--ignore", "--time=0", self.name)

    def log(self) -> str:
        """What it wrote so far."""
        done = subprocess.run(["podman", *self.storage, "logs", self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def python(self, code: str) -> str:
        """What `code` prints inside."""
        return self._execute("python", "-c", code).stdout.strip()

    def _is_running(self) -> bool:
        return self._podman("inspect", "--format={{.State.Running}}", self.name) == "true"

    def _execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        call = ["podman", *self.storage, "exec", self.name, *command]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    def _podman(self, *arguments: str) -> str:
        done = subprocess.run(["podman", *self.storage, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadConfig(f"podman {arguments[0]} failed: {done.stderr.strip()[-600:]}")
        return done.stdout.strip()
