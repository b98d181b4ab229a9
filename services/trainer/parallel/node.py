"""One machine's processes of a training, under torch's own elastic agent: met, started, and started again together.

    python -m services.trainer.parallel.node FOLDER [HOLDER]   the machine that has the job; `launch` starts it
    python -m services.trainer.parallel.node                   another: joins the first training that wants it

Where a process is killed, on whichever machine, all of them end and begin again at the last checkpoint, as often as the
group says; a training that has told its error is not begun again. On another machine this is all that runs: it needs
neither NATS nor the object store, only the folder of the runs, shared with the machine that has the job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from services.trainer.config import NodeConfig
from services.trainer.parallel.groups import RESTARTS_FILE, Group, announced, read_group
from services.trainer.parallel.launch import errors_told, write_error
from smeltkit import limits
from smeltkit.config import default_environment, from_environment
from smeltkit.errors import ProcessLost, SmeltError, Timeout

_STORE: Final = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Each group meets in a store of its own: torch shares that of the agents, where addresses of the last group's lie."""
_GOES_ON: Final = "the job goes on from its last checkpoint"


def main(arguments: Sequence[str]) -> int:
    """0 once the processes have done their work, or told their error; else 1."""
    if not arguments:
        return join(from_environment(NodeConfig, "SMELT_NODE_"))
    folder = Path(arguments[0])
    group = read_group(folder)
    assert group is not None, f"{folder} announces no group"
    return run(folder, group, group.address.rpartition(":")[0], arguments[1:], is_host=True)


def join(config: NodeConfig) -> int:
    """Takes part in the first training that wants another machine, until it has ended; Timeout where none does."""
    deadline_s = time.monotonic() + config.wait_s
    while time.monotonic() < deadline_s:
        for folder in announced(config.runs_dir):
            group = read_group(folder)
            if group and run(folder, group, config.address, is_host=False) == 0:
                return 0
        time.sleep(limits.TRAIN_POLL_S)
    raise Timeout(f"no training below {config.runs_dir} wanted another machine within {config.wait_s:g} s")


def run(folder: Path, group: Group, address: str, marks: Sequence[str] = (), *, is_host: bool) -> int:
    """Runs this machine's processes of a training; 0 if it ended as it should.

    Others reach this machine at `address`, by its host name if that is empty. `marks` are told to the processes after
    their folder. On the host, which alone answers for the training, what ends it otherwise is left where the processes
    leave their errors: ProcessLost, or Timeout if too few machines came.
    """
    default_environment(_STORE)
    parameters = RendezvousParameters(
        "c10d", group.address, group.id, group.nodes, group.nodes, address or None,
        is_host=is_host, join_timeout=group.wait_s, read_timeout=min(group.wait_s, limits.TRAIN_STORE_TIMEOUT_S),
    )  # fmt: skip
    try:
        backend, store = create_backend(parameters)
        handler = create_handler(store, backend, parameters)
        spec = WorkerSpec(
            role="training",
            local_world_size=group.processes,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-m", group.module, str(folder), *marks),
            max_restarts=group.restarts,
            monitor_interval=limits.TRAIN_POLL_S,
            local_addr=address or None,
        )
        agent = _Agent(spec, folder, is_host=is_host)
        result = agent.run()
        handler.shutdown()
    except SignalException as signalled:
        raise SystemExit(str(signalled)) from None
    except RendezvousTimeoutError:
        # The state as this machine saw it last; torch has no other way to tell.
        came = max(len(handler._state_holder.state.participants), 1)
        if is_host:
            write_error(folder, Timeout(
                f"{came} of {group.nodes} machines came within {group.wait_s} s to train together; start the others, or"
                " lower nodes"
            ))  # fmt: skip
        return 1
    except RendezvousError as error:
        sys.stderr.write(f"{folder.name}: {error}\n")
        if is_host and not errors_told(folder):
            write_error(folder, ProcessLost(f"another machine left the training: {error}; {_GOES_ON}"))
        return 1
    failed = bool(result and result.is_failed())  # none where this machine was one too many
    if failed and is_host and not errors_told(folder) and agent.killed:
        write_error(folder, ProcessLost(f"{agent.killed}, after {group.restarts} restarts; {_GOES_ON}"))
    return int(failed and is_host)


class _Agent(LocalElasticAgent):
    """torch's agent of one machine, which tells of restarts and makes none once the training has told its error."""

    def __init__(self, spec: WorkerSpec, folder: Path, *, is_host: bool) -> None:
        super().__init__(spec, DefaultLogsSpecs(os.devnull), exit_barrier_timeout=limits.TRAIN_EXCHANGE_TIMEOUT_S)
        self._folder, self._is_host, self._parent = folder, is_host, os.getppid()
        self.killed = ""
        """Which process was killed last, if any was, in words."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """See SimpleElasticAgent. Where one is killed the others are too: they would wait for it for long."""
        assert isinstance(self._pcontext, SubprocessContext)
        if os.getppid() != self._parent:
            raise SignalException("whoever started this training is gone", signal.SIGKILL)
        codes = {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}
        lost = [(rank, -code) for rank, code in codes.items() if code is not None and code < 0]
        if lost:
            worker = worker_group.workers[lost[0][0]]
            self.killed = f"process {worker.global_rank} of {worker.world_size} was killed by signal {lost[0][1]}"
            self._pcontext.close(signal.SIGKILL)
        result: RunResult = super()._monitor_workers(worker_group)
        if errors_told(self._folder):
            self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self._is_host:
            how = self.killed or "a process was lost, here or on another machine"
            left = f"all go on from the last checkpoint, {self._remaining_restarts} restarts are left"
            with (self._folder / RESTARTS_FILE).open("a") as file:
                file.write(json.dumps({"message": f"{how}; {left}"}) + "\n")
        self.killed = ""
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup, *given: object, **named: object) -> None:
        self._end(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *given: object, **named: object) -> None:
        """Processes save before they end where the whole training is to end: where the host is told to."""
        self._end(death_sig if self._is_host else signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        """Ends the processes; what else torch's versions are told here, they do not agree on."""
        if self._pcontext is not None:
            self._pcontext.close(how, int(limits.JOB_CANCEL_GRACE_S / 3) - 1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SmeltError as error:
        sys.exit(f"{error.reason()}: {error.message}")
