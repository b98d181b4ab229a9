"""Certificates for tests: one authority a session folder, one folder a service."""

from __future__ import annotations

from pathlib import Path

from smeltkit.certificates import issue, make_authority
from smeltkit.rpc.tls import Identity


class Authority:
    """An authority below `folder`, and what it issued."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._home = make_authority(folder)

    def folder_of(self, name: str, *, days: int = 1) -> Path:
        """The folder with the certificate of `name`; a certificate of -1 days has ended."""
        folder = self._folder / name
        return folder if folder.exists() and days == 1 else self.renew(name, days=days)

    def renew(self, name: str, *, days: int = 1) -> Path:
        """The same folder with another certificate and key."""
        return issue(self._home, self._folder / name, name, days=days)

    def identity(self, name: str) -> Identity:
        """Who `name` is."""
        return Identity(self.folder_of(name))
