"""Secrets that may lie in files: read again when the file changes, so that they can be replaced at running processes.

A file holds one secret a line. The first is the one that is shown to others; each is accepted from them. So a secret is
replaced without a moment in which somebody is refused: add the new one as a second line everywhere, swap the two
everywhere, take the old one out.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig

_LOG = logging.getLogger(__name__)


class Secret:
    """A token or password: a text, or what a file holds by now. Calling it gives the text to show, empty for none."""

    def __init__(self, text: str = "", *, file: str = "") -> None:
        """BadConfig if both are given, or the file cannot be read or holds nothing."""
        if text and file:
            raise BadConfig(f"a secret is given in clear and as the file {file}; leave one of the two out")
        self._path = Path(file) if file else None
        self._stamp = self._look()
        self._texts: Sequence[str] = self._read() if self._path else (text,)

    def __call__(self) -> str:
        return self.texts[0]

    def __bool__(self) -> bool:
        return bool(self._texts[0])

    def __repr__(self) -> str:
        return f"Secret({self._path or '...'})"

    @property
    def texts(self) -> Sequence[str]:
        """Every text that is accepted, as the file is now; as it was, while it cannot be read."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._texts = self._read()
                _LOG.info("a secret was read again", extra={"file": str(self._path)})
            except BadConfig as error:
                _LOG.warning("the secret in use is kept: %s", error)
        return self._texts

    def accepts(self, shown: str) -> bool:
        """Whether `shown` is one of the texts; takes as long for a wrong one as for a right one."""
        given = shown.encode()
        return any([hmac.compare_digest(given, text.encode()) for text in self.texts])

    def _look(self) -> tuple[int, int, int] | None:
        """What changes when the file is replaced, also behind a link."""
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None

    def _read(self) -> Sequence[str]:
        assert self._path is not None
        try:
            with self._path.open("rb") as file:
                lines = file.read(limits.SECRET_FILE_MAX_BYTES).decode("ascii").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(
                f"the secret in {self._path} cannot be read: {error}; it must be ASCII text, in a cluster of a"
                " Secret that is mounted there"
            ) from error
        texts = tuple(text for text in (line.strip() for line in lines) if text)
        if not texts:
            raise BadConfig(f"{self._path} holds no secret; write one, in one line")
        return texts
