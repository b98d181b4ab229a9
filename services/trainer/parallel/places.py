"""Which of the processes of a training this one is, as torchrun and its like tell it by the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from smeltkit.config import environment
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among those of its training, on all machines and on its own."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_alone_here(self) -> bool:
        """Whether all processes are on this machine."""
        return self.local_count == self.count

    def check(self, processes: int) -> None:
        """BadConfig unless the settings ask for as many processes as there are."""
        if self.count != processes:
            raise BadConfig(
                f"processes={processes}, but {self.count} were started; set it to {self.count}, or start {processes}"
            )


ALONE_HERE: Final = Place()


def place() -> Place:
    """This process's place; alone where nothing says otherwise."""
    names = environment()
    return Place(
        rank=int(names.get("RANK", 0)),
        count=int(names.get("WORLD_SIZE", 1)),
        local_rank=int(names.get("LOCAL_RANK", 0)),
        local_count=int(names.get("LOCAL_WORLD_SIZE", 1)),
    )
