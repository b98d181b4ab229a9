"""The whole platform on loopback, driven by the `smelt` command as a person would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from smelt.job.v1 import job_pb2, job_pb2_grpc

from gateway import stack

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "ore-11m"
BASIC = ROOT / "examples" / "data" / "basic.jsonl"


@dataclass(frozen=True)
class Smelt:
    """The command line against one platform."""

    home: Path

    def run(self, *arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        """The finished command; `stdin` is what it reads."""
        command = [sys.executable, "-m", "gateway.cli.main", *arguments]
        env = {**os.environ, "SMELT_HOME": str(self.home), **environ}
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240)

    def __call__(self, *arguments: str, stdin: str = "", **environ: str) -> dict[str, Any]:
        """The JSON document of a command that must succeed."""
        done = self.run(*arguments, "--json", stdin=stdin, **environ)
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def kill(self, name: str) -> None:
        """SIGKILL to one process of the platform."""
        pid = next(item.pid for item in stack.status(self.home).components if item.name == name)
        os.kill(pid, signal.SIGKILL)

    def wait_until(self, job_id: str, is_enough: Callable[[job_pb2.Job], bool]) -> None:
        """Returns once the job is enough, asked every 10 ms: a command takes longer than the work; it must not end."""
        with grpc.insecure_channel(stack.status(self.home).gateway_grpc) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            while True:
                job = stub.GetJob(job_pb2.GetJobRequest(id=job_id), timeout=30).job
                if is_enough(job):
                    return
                assert job.state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING), job
                time.sleep(0.01)


@pytest.fixture(scope="package")
def smelt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smelt]:
    """A running platform with the shipped model imported as `ore-11m` and quantized to Q8_0."""
    command = Smelt(tmp_path_factory.mktemp("e2e") / "home")
    try:
        command("up")
        command("import", str(MODEL), "--name", "ore-11m")
        command("quantize", "ore-11m", "--scheme", "Q8_0")
        yield command
    finally:
        stack.stop(command.home)
