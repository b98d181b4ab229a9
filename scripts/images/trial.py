"""The whole platform from its images: six containers beside a real NATS and a real S3, and the main job through them.

Each container is first looked at by itself, and a sandbox runs a program. Then the shipped model is imported,
quantized, served and scored by the command line from outside, and every container is asked to end.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from smelt.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from gateway.stack.components import Component, platform_config, server_components, service_components
from gateway.stack.health import wait_healthy, wait_writable
from gateway.stack.process import ProcessRecord, start_process, stop_processes
from gateway.stack.state import StackState, load_credentials
from scripts.images.catalogue import ROOT, Image
from scripts.images.containers import CACHE, Container
from smeltkit.bus import topology
from smeltkit.bus.client import Bus
from smeltkit.config import PlatformConfig, environment
from smeltkit.errors import StackDown
from smeltkit.servers import clear_s3_sockets

GRACE_S = 60
ORDER = ("sandbox", "inference", "importer", "trainer", "evaluator", "gateway")
MODEL, SUITE = ROOT / "examples" / "models" / "ore-11m", ROOT / "examples" / "data" / "basic.jsonl"
PROGRAMS = {
    "bare": ("print(6 * 7)", "42"),
    "science": ("import numpy; print(numpy.arange(4) @ numpy.arange(4))", "14"),
}
"""A program for each profile of the sandbox, and what it prints."""
_PROGRAM_S = 60
_DRIVER = """
import tempfile
from pathlib import Path
from triton.backends.nvidia import driver
from triton.runtime import build
folder = tempfile.mkdtemp()
source = Path(folder, "main.c")
source.write_text(Path(driver.__file__).with_name("driver.c").read_text())
print(Path(build._build("cuda_utils", str(source), folder, [], [], [], [])).is_file())
"""
"""What Triton does on its first GPU before it computes; it needs none."""
_PROOF = """
import json
from services.trainer.config import ProofConfig
from services.trainer.proof import prove
print(json.dumps(prove(ProofConfig(device="cpu"))))
"""
"""A training step by torch as it is in the image, held against the reference."""
_OWN = ("HOME", "TMPDIR", "PATH", "LANG", "PYTHONUNBUFFERED", "SMELT_TELEMETRY_TRACE_DIR")


def run(
    names: Sequence[str], images: Mapping[str, Image], storage: tuple[str, ...], home: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row an image (what it did wrong, how it ended); where all of ORDER run, what the main job gave.

    The images of ORDER run side by side; others, which do the work of one of those, one by one after them.
    """
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o755)
    groups = [[name for name in ORDER if name in names], *([name] for name in names if name not in ORDER)]
    rows: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {}
    with servers(home) as state:
        for group in groups:
            found, done = _run_together([images[name] for name in group], storage, home, state)
            rows, outcome = rows + found, outcome | done
    return rows, outcome


def _run_together(
    images: Sequence[Image], storage: tuple[str, ...], home: Path, state: StackState
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    components = {item.name: item for item in service_components(home, state, load_credentials(home), {})}
    containers: dict[str, Container] = {}
    outcome: dict[str, Any] = {}
    try:
        for image in images:
            component = components[image.service]
            containers[image.name] = Container.start(
                image,
                storage,
                environment=_settings(component),
                address=component.address,
                cache=home / "volumes" / image.name,
            )
            containers[image.name].wait_serving()
        wrong = {name: [*one.mistakes(), *_misjudged(one), *_driverless(one)] for name, one in containers.items()}
        if set(containers) == set(ORDER):
            outcome = main_job(state.address("gateway"), home)
            outcome["engine"] = containers["inference"].python(
                "from services.inference.llama import system_info; print(system_info())"
            )
            outcome["has_row_kernels"] = containers["inference"].python(
                "from services.inference.llama import has_row_kernels; print(has_row_kernels())"
            )
        rows = []
        for name in reversed(containers):
            proof = _proof(containers[name])
            code, took_s = containers[name].stop(GRACE_S)
            unproven = ["a training step does not run"] if proof == {} else []
            row = {"image": name, "wrong": wrong[name] + unproven, "exit": code, "ended_s": round(took_s, 1)}
            rows.append(row if proof is None else {**row, "proof": proof})
    finally:
        for container in containers.values():
            container.remove()
    return rows, outcome


def _misjudged(container: Container) -> list[str]:
    """What a sandbox answers other than it must to a program of the profile that its image is there for."""
    if not container.image.profile:
        return []
    code, wanted = PROGRAMS[container.image.profile]
    with grpc.insecure_channel(container.address) as channel:
        reply = sandbox_pb2_grpc.SandboxServiceStub(channel).Execute(
            sandbox_pb2.ExecuteRequest(code=code.encode(), profile=container.image.profile),
            timeout=_PROGRAM_S,
        )
    told = reply.stdout.decode(errors="replace").strip()
    return [] if told == wanted else [f"profile {container.image.profile}: {code!r} gives {told!r}: {reply.stderr!r}"]


def _driverless(container: Container) -> list[str]:
    """What keeps Triton from meeting a GPU where there is no compiler."""
    if container.image.needs != "cuda" or container.python(_DRIVER) == "True":
        return []
    return ["Triton gets no driver: it would look for a C compiler on its first GPU"]


def _proof(container: Container) -> dict[str, Any] | None:
    """What a trainer's image proves on the CPU, nothing where it fails; None for other images."""
    if container.image.service != "trainer":
        return None
    said = container.python(_PROOF)
    return dict(json.loads(said)) if said else {}


def _settings(component: Component) -> dict[str, str]:
    """What the process is told inside of a container: as on one machine, with the container's own folders."""
    found = {name: value for name, value in component.environment.items() if name not in _OWN}
    found |= {name: CACHE for name in found if name.endswith("_CACHE_DIR")}
    if component.name == "sandbox":
        found |= {"SMELT_SANDBOX_LEVEL": "confined", "SMELT_SANDBOX_SLOTS": "1"}
    if component.name == "importer":
        found["HF_HOME"] = f"{CACHE}/huggingface"
    return found


def main_job(gateway: str, home: Path) -> dict[str, Any]:
    """Import, quantize, generate, score: by the command line, as from another machine."""
    made = _smelt(gateway, home, "import", str(MODEL), "--name", "ore-11m")
    quantized = _smelt(gateway, home, "quantize", "ore-11m", "--scheme", "Q8_0", "--name", "ore-11m:q8_0")
    report = _smelt(gateway, home, "eval", "--suite", "basic", "--data", str(SUITE), "ore-11m:q8_0")
    score = report["scores"][0]
    return {
        "imported_bytes": made["artifact"]["size_bytes"],
        "quantized_bytes": quantized["artifact"]["size_bytes"],
        "score": score,
    }


@contextmanager
def servers(home: Path) -> Iterator[StackState]:
    """NATS and S3 as processes of this machine, with bucket and topology."""
    state, credentials = StackState.create(), load_credentials(home)
    platform = platform_config(state, credentials)
    records: list[ProcessRecord] = []
    (home / "tmp").mkdir()
    try:
        for component in server_components(home, state, credentials):
            log = home / "logs" / f"{component.name}.log"
            record = start_process(
                component.command, environment=component.environment, folder=component.folder, log_path=log
            )
            records.append(record)
            asyncio.run(wait_healthy(component, record, log))
        asyncio.run(_prepare(platform))
        yield state
    finally:
        stop_processes(records, timeout_s=10)
        clear_s3_sockets(state.ports)


async def _prepare(platform: PlatformConfig) -> None:
    await wait_writable(platform)
    bus = await Bus.connect(platform, name="trial")
    try:
        await topology.apply(bus)
    finally:
        await bus.close()


def _smelt(gateway: str, home: Path, *arguments: str) -> dict[str, Any]:
    """The document that `smelt ARGUMENTS --json` prints; StackDown with its message if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli.main", *arguments, "--json"],
        env=environment({"SMELT_GATEWAY": gateway, "SMELT_HOME": str(home)}), cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise StackDown(f"smelt {' '.join(arguments[:2])} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document
