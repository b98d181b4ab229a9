"""Which interpreters are on offer: `bare` is the standard library, `science` adds the packages of one folder."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.sandbox.config import SandboxConfig
from services.sandbox.policy import PRELOAD
from smeltkit.errors import BadConfig, UnsupportedOption

BARE: Final = "bare"
SCIENCE: Final = "science"
OWN_NAMES: Final = frozenset(("candidate", "tests", "__future__"))
"""Modules that exist only in a candidate's process."""
_UNBOUND: Final = ("/tmp", "/dev", "/proc", "/scratch")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One interpreter as candidates see it."""

    name: str
    folder: str = ""
    """Where its packages are; empty for none."""
    preload: tuple[str, ...] = PRELOAD
    """Modules that its zygote imports once."""
    modules: frozenset[str] = frozenset()
    """Top-level names of its packages."""

    @property
    def can_exec(self) -> bool:
        """Whether candidates may start the interpreter as a program, where they may start processes at all."""
        return bool(self.folder)

    def has(self, module: str) -> bool:
        """Whether a candidate can import the top-level name `module`."""
        return module in sys.stdlib_module_names or module in OWN_NAMES or module in self.modules


def find_profiles(config: SandboxConfig) -> dict[str, Profile]:
    """Name to profile; BadConfig if the folder of packages cannot be used."""
    found = {BARE: Profile(name=BARE)}
    if config.science_packages:
        folder = os.path.realpath(config.science_packages)
        if not os.path.isdir(folder) or folder.startswith(tuple(f"{path}/" for path in _UNBOUND)):
            raise BadConfig(
                f"science_packages={config.science_packages} must be a folder outside {', '.join(_UNBOUND)}, such as "
                "the site-packages of an environment made for this interpreter"
            )
        preload = tuple(filter(None, config.science_preload.split(",")))
        modules = frozenset(path.name.partition(".")[0] for path in Path(folder).iterdir())
        found[SCIENCE] = Profile(name=SCIENCE, folder=folder, preload=(*PRELOAD, "unittest", *preload), modules=modules)
    return found


def choose_profile(profiles: dict[str, Profile], name: str) -> Profile:
    """The profile called `name`, `bare` for none; UnsupportedOption otherwise."""
    profile = profiles.get(name or BARE)
    if profile is None:
        raise UnsupportedOption(f"profile {name!r} is not on offer here; available: {', '.join(profiles)}")
    return profile
