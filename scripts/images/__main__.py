"""`python -m scripts.images build|test|save|clean [IMAGE ...]`: makes and judges images; runs the platform from them.

All lies below build/images. `build` writes a bill of materials for each image there and ends with 1 if one breaks a
promise; `test` runs them side by side, all of them with the main job, and keeps in benchmarks/results what came of all
(images.json) or of those with CUDA (images_cuda.json); `save` writes them as files for where there is no registry.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import save, table
from scripts.images import cpus, trial
from scripts.images.bill import bill_of, licence_errors
from scripts.images.builder import Builder
from scripts.images.catalogue import REVISION, ROOT, Image, chosen, images, labels, version
from scripts.images.judge import MIB, mistakes, unpacked_bytes
from smeltkit.errors import SmeltError

FOLDER = ROOT / "build" / "images"
_DIGITS = 12


def main(verb: str, *names: str) -> int:
    """The exit status: 1 if an image breaks a promise, or cannot be made."""
    try:
        builder = Builder(FOLDER)
        if verb == "clean":
            builder.clean()
            return 0
        wanted = chosen(names)
        for image in wanted if verb == "build" else ():
            builder.build(image)
        rows = [judged(builder, image) for image in wanted]
        print(table([{**row, "wrong": len(row["wrong"])} for row in rows]))
        wrong = [f"{row['image']}: {line}" for row in rows for line in row["wrong"]]
        if verb == "save" and not wrong:
            _saved(builder, wanted)
        if verb == "test":
            print("".join(_stale(rows)), end="")
            wrong += _tried(builder, rows, is_whole=not names)
    except SmeltError as error:
        print(f"WRONG {error}", file=sys.stderr)
        return 1
    print("".join(f"WRONG {line}\n" for line in wrong), end="")
    return 1 if wrong else 0


def judged(builder: Builder, image: Image) -> dict[str, Any]:
    """What is known of a built image: its size beside its budget, its packages, and what is wrong with it."""
    described = builder.config(image)
    with builder.mounted(image) as root:
        bill = bill_of(root, image, version())
        wrong = [*mistakes(image, root, described), *licence_errors(bill, image)]
        size_mib = unpacked_bytes(root) / MIB
    place = FOLDER / "bills" / f"{image.name}.cdx.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(bill, indent=1) + "\n")
    kinds = [component["purl"].partition("/")[0] for component in bill["components"]]
    return {
        "image": image.name,
        "revision": (described["config"].get("Labels") or {}).get(REVISION, "")[:_DIGITS],
        "mib": round(size_mib),
        "budget_mib": image.budget_mib,
        "python": kinds.count("pkg:pypi"),
        "debian": kinds.count("pkg:deb"),
        "wrong": wrong,
    }


def _stale(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each image of another revision than the one that is checked out."""
    here = labels()[REVISION][:_DIGITS]
    return [
        f"note: {row['image']} was built from {row['revision']}, this is {here}; `build` makes it anew\n"
        for row in rows
        if row["revision"] != here
    ]


def _saved(builder: Builder, wanted: Sequence[Image]) -> None:
    """OCI archives, bills of materials, the digests that an overlay names, and sums for `sha256sum --check`."""
    folder = FOLDER / "saved"
    folder.mkdir(exist_ok=True)
    digests = {f"smelt/{image.name}": builder.save(image, folder) for image in wanted}
    lines = [f"  - {{name: {name}, digest: {digest}}}" for name, digest in digests.items()]
    (folder / "images.yaml").write_text("\n".join(["images:", *lines, ""]))
    for image in wanted:
        shutil.copy(FOLDER / "bills" / f"{image.name}.cdx.json", folder)
    write_sums(folder)
    print(f"saved in {folder}")


def write_sums(folder: Path) -> None:
    """SHA256SUMS over all files of `folder`, as `sha256sum --check` reads it there."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = []
    for path in files:
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def _tried(builder: Builder, rows: list[dict[str, Any]], *, is_whole: bool) -> list[str]:
    """Runs the images side by side and records what came of it; what went wrong. The whole platform also does a job."""
    kinds: list[dict[str, Any]] = []
    if is_whole:
        with builder.mounted(images()["inference"]) as root, cpus.question() as question:
            kinds = cpus.rows(root, question)
        print(table([{**row, "wrong": len(row["wrong"])} for row in kinds]))
    found, outcome = trial.run([row["image"] for row in rows], images(), builder.storage, FOLDER / "trial")
    print(table([{**row, "wrong": len(row["wrong"]), "proof": "proof" in row} for row in found]))
    if is_whole:
        print(json.dumps(outcome, indent=1))
    if is_whole:
        save("images", rows, cpus=kinds, trial=found, outcome=outcome)
    elif all(images()[row["image"]].needs == "cuda" for row in rows):
        save("images_cuda", rows, trial=found)
    wrong = [f"{row['cpu']}: {line}" for row in kinds for line in row["wrong"]]
    return wrong + [f"{row['image']}: {line}" for row in found for line in _wrong(row)]


def _wrong(row: dict[str, Any]) -> list[str]:
    late = [] if row["exit"] == 0 else [f"SIGTERM ended it with {row['exit']} after {row['ended_s']} s"]
    return [*row["wrong"], *late]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("build", "test", "save", "clean"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
