"""A worker of the toy service as a process of its own, to be killed: `python jobs_toy.py NATS_URL EFFECTS_FILE`.

Every handler run appends a line `<job id> <attempt> <fence> <what>` to the effects file. Kinds:
    count   fifteen steps of 0.1 s, one effect at the end
    once    like count, but the first attempt never ends
    die     kills its own process
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smeltkit.bus import Bus
from smeltkit.config import PlatformConfig
from smeltkit.ids import digest_bytes
from smeltkit.jobs.attempt import JobContext
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.sweeper import run_sweeper
from smeltkit.jobs.worker import Worker
from smeltkit.testing.jobs import BOUNDS, SERVICE, JobRig

STEPS = 15


class Effects:
    """The lines that handler runs left behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, context: JobContext, what: str) -> None:
        """Appends one line, all of it or nothing."""
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{context.job_id} {context.attempt} {context.fence} {what}\n".encode())

    def of(self, id: str, what: str) -> list[tuple[int, int]]:
        """Attempt and fence of each run of the job that left this line."""
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [(int(attempt), int(fence)) for job, attempt, fence, done in lines if (job, done) == (id, what)]


def result_of(fence: int) -> str:
    """The result that the holder of this token writes."""
    return digest_bytes(str(fence).encode())


@contextmanager
def worker_process(rig: JobRig, effects: Effects) -> Iterator[subprocess.Popen[bytes]]:
    """A running worker process; killed at the end if it still lives."""
    process = subprocess.Popen([sys.executable, __file__, rig.server.url, str(effects.path)])
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(30)


async def _main(url: str, effects: Effects) -> None:
    async def count(context: JobContext) -> str:
        effects.add(context, "begun")
        for step in range(STEPS):
            await context.progress("count", step + 1, STEPS, "steps")
            await asyncio.sleep(0.1)
        await context.check_alive()
        effects.add(context, "done")
        return result_of(context.fence)

    async def once(context: JobContext) -> str:
        if context.attempt == 1:
            effects.add(context, "begun")
            await asyncio.Event().wait()
        return await count(context)

    async def die(context: JobContext) -> str:
        effects.add(context, "begun")
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    config = PlatformConfig(nats_url=url, s3_endpoint="", s3_access_key="", s3_secret_key="")
    bus, stop = await Bus.connect(config, name="toy"), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    ledger = JobLedger(bus, BOUNDS)
    worker = Worker(bus, ledger, SERVICE, {"count": count, "once": once, "die": die})
    await asyncio.gather(worker.run(stop), run_sweeper(ledger, stop))
    await bus.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Effects(Path(sys.argv[2]))))
