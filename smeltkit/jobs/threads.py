"""Blocking work of a job in a thread: progress goes to the event loop, a cancel comes back to the thread."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from smeltkit import limits
from smeltkit.errors import DiskFull, JobCancelled
from smeltkit.jobs.worker import JobContext

P = ParamSpec("P")
T = TypeVar("T")


class Reporter:
    """Lets a thread report progress of a job. Made on the event loop."""

    def __init__(self, context: JobContext) -> None:
        self._context, self._loop = context, asyncio.get_running_loop()

    def phase(
        self, name: str, total: int, unit: str = "bytes", message: Callable[[], str] | None = None
    ) -> Callable[[int], None]:
        """A function that reports how much of the phase is done; it raises JobCancelled once the job is to stop.

        `message`, if given, is asked each time for a line for people.
        """

        def report(done: int) -> None:
            if self._context.cancelled.is_set():
                raise JobCancelled(f"job {self._context.job_id} is to stop")
            update = self._context.progress(name, min(done, total), total, unit, message() if message else "")
            asyncio.run_coroutine_threadsafe(update, self._loop)

        return report

    def measure(
        self, measured: Mapping[str, float], course: Sequence[float], *, alert: str = "", note: str = ""
    ) -> None:
        """See `JobContext.measure`."""
        asyncio.run_coroutine_threadsafe(self._context.measure(measured, course, alert=alert, note=note), self._loop)


async def run(context: JobContext, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns, done in a thread. When cancelled, it waits for the thread to notice before it gives up.

    DiskFull where the file system has no room left.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        context.cancelled.set()
        await asyncio.wait({task}, timeout=limits.JOB_CANCEL_GRACE_S / 2)
        if task.done() and not task.cancelled():
            task.exception()
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space is left for the files of this job; free some and try again") from error
        raise
