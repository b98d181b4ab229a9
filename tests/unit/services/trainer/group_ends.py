"""Groups of processes, without torch in them, that end in different ways, each in a folder: `group_ends.py FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from services.trainer.parallel.groups import Group, read_group
from services.trainer.parallel.launch import outcome_file, write_outcome


def be_lost(folder: Path, rank: int) -> None:
    """The second of two kills itself."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def diverge(folder: Path, rank: int) -> None:
    """The second of two tells an error of its own."""
    if rank == 1:
        write_outcome(outcome_file(folder, rank), {"reason": "TRAINING_DIVERGED", "message": "as asked"})
        sys.exit(1)
    signal.pause()


def main(folder: Path) -> None:
    """Runs one group after the other."""
    from services.trainer.parallel import node

    ends = {"alone": Group(module="group_ends", nodes=2, processes=1, wait_s=3)}
    ends |= {name: Group(module="group_ends", nodes=1, processes=2, restarts=1) for name in ("lost", "diverged")}
    for name, group in ends.items():
        (folder / name).mkdir()
        group.write(folder / name)
        announced = read_group(folder / name)
        assert announced is not None
        assert node.run(folder / name, announced, "127.0.0.1", is_host=True) == 1


if __name__ == "__main__":
    if "RANK" in os.environ:
        own = Path(sys.argv[1])
        {"lost": be_lost, "diverged": diverge}[own.name](own, int(os.environ["RANK"]))
    else:
        main(Path(sys.argv[1]))
