"""What the machines of one training must agree on to start its processes; known without torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from smeltkit import limits

LOOPBACK: Final = "127.0.0.1:0"
"""Where the processes of one machine meet: at any port that is free."""
RESTARTS_FILE: Final = "restarts.jsonl"
"""A line for each time that all processes of a training were started again."""
_GROUP_FILE: Final = "group.json"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a training, the same number on each machine."""

    module: str
    """What they run, with the folder as its argument: a module by its full name."""
    nodes: int
    """Machines."""
    processes: int
    """Processes of each machine."""
    address: str = LOOPBACK
    """host:port of the machine that has the job, where all of them meet."""
    restarts: int = limits.TRAIN_RESTARTS_MAX
    """Times that all start again from the last checkpoint because one was lost."""
    wait_s: int = limits.TRAIN_NODES_WAIT_S
    """Seconds within which all machines must come, at first and after each loss."""
    id: str = ""
    """Told apart from groups of earlier attempts by this."""

    def write(self, folder: Path) -> None:
        """Announces the group in the folder of its training, under an id of its own."""
        fresh = folder / f".{_GROUP_FILE}.new"
        fresh.write_text(json.dumps({**asdict(self), "id": uuid4().hex}))
        os.replace(fresh, folder / _GROUP_FILE)


def read_group(folder: Path) -> Group | None:
    """The group that a training has announced in its folder; None if none has, or it is over."""
    try:
        return Group(**json.loads((folder / _GROUP_FILE).read_text()))
    except FileNotFoundError:
        return None


def end_group(folder: Path) -> None:
    """Takes the announcement back: nobody may join any more."""
    (folder / _GROUP_FILE).unlink(missing_ok=True)


def announced(runs: Path) -> list[Path]:
    """Folders below `runs` whose trainings have announced groups of several machines."""
    found = sorted(path.parent for path in runs.glob(f"*/{_GROUP_FILE}"))
    return [folder for folder in found if (group := read_group(folder)) and group.nodes > 1]
