"""What goes wrong on a cluster, one fault a round while evaluations run, and what must hold after it.

A round starts two evaluations by the gateways, strikes at a random moment, mends, and holds the outcome against what
was asked: both jobs ended well, each problem once and with the known score, one fact a job, no job or lease left over,
and the same request again is the same job.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from smelt.inference.v1 import inference_pb2 as pb
from smelt.job.v1 import job_pb2

from scripts.cluster.caller import Caller, faults_of
from scripts.cluster.cluster import Cluster
from smeltkit import limits
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import topology
from smeltkit.config import environment
from smeltkit.errors import SmeltError, StoreUnavailable
from smeltkit.jobs import model
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.rpc.channel import stream
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server

JOBS, LIMIT = 2, 12
"""Evaluations a round, and problems of each."""
LATEST_S: Final = 3.0
"""A fault strikes within this time: about as long as a round without one lasts."""
END_S: Final = limits.JOB_ATTEMPTS_MAX * (limits.EVALUATION_OUTAGE_MAX_S + 60) + sum(limits.JOB_BACKOFF_S)
"""What the platform allows a job whose store answers by errors alone: the patience of each attempt and the last call of
it, and the pauses between them. Whatever takes longer is taken to run for ever."""
S3_DOWN_S: Final = 20.0
"""How long the object store stays away."""
STREAMS, TOKENS = 8, 48
CLOCKED: Final = ("evaluator", "gateway")
"""Services whose clocks can be stepped."""
_HEAL_S, _RECOVERY_S, _SWEEPERS, _WRITES = 90.0, 10.0, 2, 32
_STEPPED: Final = Path(__file__).resolve().parent / "stepped_clock.py"


@dataclass(kw_only=True)
class Scene:
    """Where a fault strikes."""

    cluster: Cluster
    caller: Caller
    chance: random.Random
    restarts: int = 0
    """Times that the object store was started again since it took nothing with room on its disk."""

    def pod(self, *services: str) -> ServiceProcess:
        """A pod of one of the services."""
        return self.chance.choice([pod for service in services for pod in self.cluster.pods[service]])


Strike = Callable[[Scene], Awaitable[str]]
"""Strikes and mends; what went wrong meanwhile beyond the jobs, empty if nothing."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way in which something goes wrong."""

    name: str
    strike: Strike
    needs: str = ""
    """What the cluster must be made with: `clock` or `small disk`."""
    may_fail_with: frozenset[str] = frozenset()
    """Reasons with which a job may end; the evaluation then goes well when it is started again."""


@dataclass(kw_only=True)
class Round:
    """What became of one round."""

    seconds: float = 0.0
    attempts: int = 0
    """Most attempts that a job took."""
    failed: int = 0
    """Jobs that ended with an error that the fault may have."""
    restarts: int = 0
    """Times that the object store needed its operator, see `Scene`."""
    wrong: list[str] = field(default_factory=list)
    """What must not be; empty for a good round."""


async def play(scene: Scene, fault: Fault, name: str) -> Round:
    """One round; `name` tells its requests from those of all others."""
    found, began, caller, restarts = Round(), time.monotonic(), scene.caller, scene.restarts
    before = await caller.books()
    requests = {f"{name}-{number}": scene.chance.getrandbits(31) for number in range(JOBS)}
    ids = {request: await caller.start(request, seed=seed, limit=LIMIT) for request, seed in requests.items()}
    await asyncio.sleep(scene.chance.uniform(0, LATEST_S))
    if wrong := await fault.strike(scene):
        found.wrong.append(wrong)
    for request, id in ids.items():
        if (again := await caller.start(request, seed=requests[request], limit=LIMIT)) != id:
            found.wrong.append(f"{request} is {id} and {again}")
    jobs = [await _judged(caller, id, fault, found) for id in ids.values()]
    for request in [request for request, job in zip(requests, jobs, strict=True) if job and job.state == model.FAILED]:
        id = await caller.start(f"{request}-again", seed=requests[request], limit=LIMIT)
        jobs.append(await _judged(caller, id, Fault(name="none", strike=fault.strike), found))
    ended = sum(job is not None and job.state == model.SUCCEEDED for job in jobs)
    dead = found.failed + before.dead
    books = await caller.settled(before.finished + ended, dead=dead)
    if books.open_jobs or books.leased or not books.is_queue_empty:
        found.wrong.append(f"left over: {books}")
    if books.finished != before.finished + ended or books.dead > dead:
        found.wrong.append(f"{ended} evaluations ended, {books.finished - before.finished} told so, {books.dead} dead")
    found.wrong += [f"copies stay behind: {line}" for line in await healed(caller)]
    found.seconds, found.restarts = round(time.monotonic() - began, 1), scene.restarts - restarts
    return found


async def _judged(caller: Caller, id: str, fault: Fault, found: Round) -> job_pb2.Job | None:
    """The ended job, or None if it never ends; what is wrong with it is noted."""
    try:
        job = await caller.end(id, timeout_s=END_S)
    except TimeoutError:
        found.wrong.append(f"{id} is {job_pb2.JobState.Name((await caller.get(id)).state)} for ever")
        return None
    found.attempts = max(found.attempts, job.attempt)
    if job.state == model.SUCCEEDED:
        found.wrong += [f"{id}: {line}" for line in faults_of(await caller.report(job.result_digest), LIMIT)]
    elif job.error.reason in fault.may_fail_with:
        found.failed += 1
    else:
        found.wrong.append(f"{id} ended as {job_pb2.JobState.Name(job.state)}: {job.error.reason} {job.error.message}")
    return job


async def healed(caller: Caller) -> list[str]:
    """Nothing, once every stream has its three copies again; those that have not after a while."""
    deadline = time.monotonic() + _HEAL_S
    while True:
        behind = await _behind(caller)
        if not behind or time.monotonic() > deadline:
            return behind
        await asyncio.sleep(0.2)


async def leader_of(caller: Caller, stream: str) -> str:
    """Name of the server that leads a stream."""
    info = await caller.streams.call("looking for the leader", lambda: caller.streams.jetstream.stream_info(stream))
    return str(info.cluster.leader)


async def _behind(caller: Caller) -> list[str]:
    names = [str(declared.name) for declared in topology.declare().streams]
    try:
        infos = [await caller.streams.jetstream.stream_info(name) for name in names]
    except Exception as error:
        return [repr(error)]
    return [
        f"{info.config.name} at {peer.name}"
        for info in infos
        for peer in (info.cluster.replicas or [])
        if not peer.current or peer.offline
    ] + [f"{info.config.name} has no leader" for info in infos if not info.cluster.leader]


def _kill(service: str) -> Strike:
    async def strike(scene: Scene) -> str:
        pod = scene.pod(service)
        pod.kill()
        await asyncio.sleep(scene.chance.uniform(0.2, 2.0))
        await asyncio.to_thread(pod.start)
        return ""

    return strike


def _kill_nats(*, is_leader: bool) -> Strike:
    async def strike(scene: Scene) -> str:
        leader = await leader_of(scene.caller, "KV_smelt_jobs")
        node = scene.chance.choice([node for node in scene.cluster.nodes if (node.name == leader) == is_leader])
        node.kill()
        await asyncio.sleep(scene.chance.uniform(0.5, 12.0))
        await asyncio.to_thread(node.start)
        return ""

    return strike


async def _lose_s3(scene: Scene) -> str:
    scene.cluster.s3.kill()
    await asyncio.sleep(S3_DOWN_S)
    await asyncio.to_thread(scene.cluster.s3.start)
    return ""


async def _partition(scene: Scene) -> str:
    """From a blink to longer than a lease lives."""
    links = scene.chance.choice(scene.cluster.links)
    links.cut()
    await asyncio.sleep(scene.chance.uniform(0.5, 15.0))
    links.mend()
    return ""


async def _step_clock(scene: Scene) -> str:
    """One pod's clock is an hour fast or slow for a while, then right again."""
    clock = clock_of(scene.pod(*CLOCKED).folder)
    clock.write_text(scene.chance.choice(("3600", "-3600")))
    await asyncio.sleep(scene.chance.uniform(1.0, 10.0))
    clock.write_text("0")
    return ""


async def _fill_disk(scene: Scene) -> str:
    ballast = scene.cluster.s3.folder / "ballast"
    await asyncio.to_thread(_fill, ballast)
    await asyncio.sleep(scene.chance.uniform(2.0, 10.0))
    ballast.unlink()
    if not await asyncio.to_thread(_recovers, scene.cluster.s3):
        scene.restarts += 1
        scene.cluster.s3.kill()
        await asyncio.to_thread(scene.cluster.s3.start)
    return ""


def _recovers(s3: S3Server) -> bool:
    """Whether the store takes writes again, wherever it puts them, within what an operator would wait for that."""
    store, deadline = S3Store(s3.config), time.monotonic() + _RECOVERY_S
    while True:
        try:
            for _ in range(_WRITES):
                store.put_bytes(os.urandom(64))
        except StoreUnavailable:
            if time.monotonic() > deadline:
                return False
        else:
            return True


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(64 * 1024))


async def _drain_under_streams(scene: Scene) -> str:
    """SIGTERM to a replica or a gateway while streams run: none is cut, and the process ends well."""
    running = [asyncio.create_task(_stream(scene.caller, number)) for number in range(STREAMS)]
    await asyncio.sleep(scene.chance.uniform(0.1, 0.8))
    pod = scene.pod("inference", "gateway")
    code = await asyncio.to_thread(pod.terminate)
    await asyncio.to_thread(pod.start)
    ends = await asyncio.gather(*running, return_exceptions=True)
    is_good = code == 0 and set(ends) == {TOKENS}
    return "" if is_good else f"{pod.name} ended with {code}, streams of {TOKENS} tokens with {ends}"


async def _stream(caller: Caller, number: int) -> int:
    """Tokens of one stream of TOKENS."""
    request: Any = pb.GenerateRequest(model=caller.model, text=f"Count {number}", max_tokens=TOKENS, ignore_stop=True)
    async with stream(caller.inference.Generate, request, timeout_s=60) as replies:
        return sum([len(reply.ids) async for reply in replies])


async def _race_sweepers(scene: Scene) -> str:
    """A worker dies, and beside the sweepers of all services others sweep without a pause."""
    pod, caller = scene.pod("evaluator"), scene.caller
    stop = asyncio.Event()

    async def sweep(sweeper: Sweeper) -> None:
        while not stop.is_set():
            with suppress(SmeltError):
                await sweeper.sweep()
            await asyncio.sleep(0.01)

    sweeping = [asyncio.create_task(sweep(Sweeper(caller.ledger))) for _ in range(_SWEEPERS)]
    pod.kill()
    until = time.monotonic() + caller.ledger.bounds.lease_ttl_s + scene.chance.uniform(0.5, 4.0)
    await asyncio.to_thread(pod.start)
    await asyncio.sleep(max(until - time.monotonic(), 0))
    stop.set()
    await asyncio.gather(*sweeping)
    return ""


FAULTS: Final[Mapping[str, Fault]] = {
    fault.name: fault
    for fault in (
        Fault(name="kill inference", strike=_kill("inference")),
        Fault(name="kill sandbox", strike=_kill("sandbox")),
        Fault(name="kill gateway", strike=_kill("gateway")),
        Fault(name="kill evaluator", strike=_kill("evaluator")),
        Fault(name="kill NATS leader", strike=_kill_nats(is_leader=True)),
        Fault(name="kill NATS follower", strike=_kill_nats(is_leader=False)),
        Fault(name="S3 away", strike=_lose_s3),
        Fault(name="evaluator cut off NATS", strike=_partition),
        Fault(name="clock steps 1 h", strike=_step_clock, needs="clock"),
        Fault(name="disk of S3 full", strike=_fill_disk, needs="small disk", may_fail_with=frozenset({"DISK_FULL"})),
        Fault(name="SIGTERM under streams", strike=_drain_under_streams),
        Fault(name="sweepers race", strike=_race_sweepers),
    )
}
"""By name."""


def clock_of(pod: Path) -> Path:
    """The file that says how far the clock of the pod in this folder is off."""
    return pod / "clock"


def clock_settings(pod: Path) -> dict[str, str]:
    """Settings under which a pod takes its time of day from `clock_of` it."""
    clock_of(pod).write_text("0")
    (pod / "sitecustomize.py").write_text(f"import runpy\nrunpy.run_path({str(_STEPPED)!r})\n")
    paths = [str(pod), *filter(None, [environment().get("PYTHONPATH")])]
    return {"STEPPED_CLOCK": str(clock_of(pod)), "PYTHONPATH": ":".join(paths)}


async def scene_of(cluster: Cluster, caller: Caller, seed: int) -> Scene:
    """Where rounds are played: the model is on every replica, and references are judged."""
    await caller.load_everywhere(cluster)
    first = await caller.end(await caller.start("references", seed=0, limit=2), timeout_s=END_S)
    assert first.state == model.SUCCEEDED, first
    return Scene(cluster=cluster, caller=caller, chance=random.Random(seed))
