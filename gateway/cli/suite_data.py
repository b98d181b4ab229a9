"""The data of a suite, from a file or folder of the caller: proven to be the suite's before it is stored."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2

from gateway.cli.uploads import file_digest, upload
from smeltkit.errors import BadSuite, UnknownSource, UnknownSuite

if TYPE_CHECKING:
    from gateway.cli.session import Session


async def stored_data(session: Session, suite: str, data: str) -> artifact_pb2.Descriptor:
    """Stores the data file of `suite` found at `data` (the file, or its folder); the file as stored.

    UnknownSuite, UnknownSource, or BadSuite if the bytes are not those that the suite declares.
    """
    reply = await session.call(session.evaluator.ListSuites, evaluator_pb2.ListSuitesRequest())
    known = {entry.name: entry for entry in reply.suites}
    if suite not in known:
        raise UnknownSuite(f"no suite is called {suite!r}; there are {', '.join(sorted(known))}")
    declared = known[suite]
    path = _data_file(Path(data), declared)
    digest, _ = await asyncio.to_thread(file_digest, path)
    if digest != declared.data_digest:
        raise BadSuite(
            f"{path.name} has the digest {digest}, but {suite} declares {declared.data_digest}; "
            f"take {_published(declared)}"
        )
    (stored,) = await upload(session, [path])
    return stored


def _data_file(data: Path, suite: evaluator_pb2.Suite) -> Path:
    path = data / suite.data_file if data.is_dir() else data
    if not path.is_file():
        raise UnknownSource(f"{path} does not exist; {suite.name} needs {_published(suite)}")
    return path


def _published(suite: evaluator_pb2.Suite) -> str:
    """Where the right file is, for messages."""
    place = suite.data_url.removeprefix("repository:")
    return f"{place} of this repository" if place != suite.data_url else f"{suite.data_file}, published at {place}"
