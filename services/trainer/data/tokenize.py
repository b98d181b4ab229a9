"""Rows to samples by several processes at once: `python -m services.trainer.data.tokenize FOLDER RANK`.

    FOLDER/spec.json          the file, the base, the recipe, how many processes there are
    FOLDER/<number>.samples   each shard of so many rows, sealed, by whichever process's turn it was
    FOLDER/<number>.error     the first row that is wrong of a shard, in its place: reason and message

Every process reads the whole file and parses the rows of its own shards, every nth. What comes out does not depend on
how many there are, and of several wrong rows the first is told.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Final

from services.trainer.data.dataset import Tally, encode_rows, to_facts
from services.trainer.data.recipe import Recipe
from services.trainer.data.rows import rows_of
from services.trainer.data.stored import SampleFile, facts_of, join
from smeltkit import limits
from smeltkit.config import environment
from smeltkit.error_families import InvalidInput
from smeltkit.errors import DiskFull, InternalError, NotBuilt, ProcessLost, all_errors

Tell = Callable[[int], None]
"""Hears how many rows are done."""
SHARD_ROWS: Final = 4096
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Also what a process ends with."""


def processes_for(size_bytes: int) -> int:
    """How many processes read a file of that size: one for each processor that they keep busy for a while."""
    return max(min(len(os.sched_getaffinity(0)), size_bytes // limits.TOKENIZE_BYTES_A_PROCESS), 1)


def tokenize(
    path: Path,
    digest: str,
    base: Path,
    recipe: Recipe,
    folder: Path,
    target: Path,
    *,
    processes: int,
    tell: Tell = lambda rows: None,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Writes the samples of a file of that digest to `target`, sealed, with shards in `folder` on the way.

    Errors of `read_dataset`, DiskFull. `tell` hears of rows that are done, and stops the work if it raises; shards that
    an earlier call left in `folder` are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.error"):
        left.unlink()
    spec = {"path": str(path), "base": str(base), "recipe": recipe.to_dict(), "of": processes, "rows": shard_rows}
    (folder / "spec.json").write_text(json.dumps(spec))
    try:
        if processes == 1:
            make_shards(folder, 0, tell)
        else:
            _run(folder, processes, lambda: tell(len(list(folder.glob("*.samples"))) * shard_rows))
        _join(folder, target, path, recipe, digest)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(f"no space is left to tokenize {path.name}; free some and try again") from error


def _join(folder: Path, target: Path, path: Path, recipe: Recipe, digest: str) -> None:
    """One file of all shards; the error of the first wrong row in its place."""
    for first in sorted(folder.glob("*.error"), key=_number)[:1]:
        told = json.loads(first.read_text())
        raise all_errors()[told["reason"]](told["message"])
    shards, tally, samples = sorted(folder.glob("*.samples"), key=_number), Tally(), 0
    for shard in shards:
        facts = facts_of(shard)
        tally.add(Tally(**facts["tally"]))
        samples += facts["samples"]
    tally.check(samples, path.name, recipe.sequence_tokens, with_infill=bool(recipe.fim.share))
    join(shards, target, to_facts(tally, digest=digest))


def make_shards(folder: Path, rank: int, tell: Tell = lambda rows: None) -> None:
    """Does the part of process `rank`; a wrong row ends it and is left in a file."""
    spec = json.loads((folder / "spec.json").read_text())
    path, recipe, count = Path(spec["path"]), Recipe.from_dict(spec["recipe"]), spec["of"]
    shard_rows: int = spec["rows"]
    encoder = recipe.encoder(Path(spec["base"]))
    infill = recipe.infill(encoder)

    def shard_of(number: int) -> int:
        return (number - 1) // shard_rows

    shard = 0
    try:
        rows = rows_of(
            path, form=recipe.form, columns=recipe.columns, wanted=lambda number: shard_of(number) % count == rank
        )
        for shard, own in groupby(rows, key=lambda row: shard_of(row[0])):
            if any(_number(error) < shard for error in folder.glob("*.error")):
                return
            made = folder / f"{shard}.samples"
            if not made.exists():
                with made.with_suffix(".part").open("wb") as file:
                    kept = SampleFile(file)
                    tally = encode_rows(
                        kept, own, path.name, encoder, recipe.sequence_tokens,
                        text_only=recipe.text_only, infill=infill,
                    )  # fmt: skip
                    kept.seal(to_facts(tally, samples=len(kept)))
                made.with_suffix(".part").rename(made)
            tell((shard + 1) * shard_rows)
    except (InvalidInput, NotBuilt) as error:
        (folder / f"{shard}.error").write_text(json.dumps({"reason": error.reason(), "message": error.message}))


def _run(folder: Path, count: int, poll: Callable[[], None]) -> None:
    """Runs the processes to their ends; ProcessLost or InternalError if one of them ends badly."""
    command = [sys.executable, "-m", "services.trainer.data.tokenize", str(folder)]
    threads = max(len(os.sched_getaffinity(0)) // count, 1)  # of the tokenizer itself, for texts
    names = environment({"RAYON_NUM_THREADS": str(threads)})
    with (folder / "log.txt").open("wb") as log, ExitStack() as running:
        processes = []
        for rank in range(count):
            process = subprocess.Popen(
                [*command, str(rank)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=names
            )
            running.enter_context(process)
            running.callback(process.kill)
            processes.append(process)
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            poll()
            time.sleep(limits.TRAIN_POLL_S)
    if any(code in _FULL for code in codes):
        raise OSError(errno.ENOSPC, "no space left for shards")
    if any(codes):
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        kind = ProcessLost if any(code is not None and code < 0 for code in codes) else InternalError
        raise kind(f"a process that tokenizes ended with {codes}: {' '.join(tail)[:300]}")


def _number(path: Path) -> int:
    return int(path.stem)


if __name__ == "__main__":
    try:
        make_shards(Path(sys.argv[1]), int(sys.argv[2]))
    except OSError as full:
        if full.errno in _FULL:
            sys.exit(full.errno)
        raise
