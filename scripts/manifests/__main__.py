"""`python -m scripts.manifests [OVERLAY ...]`: renders and judges; without names everything that is documented.

With `--release` the images of pinned overlays must be real: a digest of zeros stands for one that is not there yet.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

from scripts.manifests.check import findings, judge_file, unpinned
from scripts.manifests.compose import docker_compose, docker_errors
from scripts.manifests.render import ROOT, TREE, Rendering, documented, render_overlay
from scripts.manifests.tree import POLICIES
from smeltkit.errors import SmeltError

_COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
_PROMTOOL = ["test", "rules", str(ROOT / "deploy" / "alerts.test.yaml")]


def main(arguments: list[str]) -> int:
    """One line a rendering, its findings below it; 1 if there are any."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    wrong = documents = renderings = 0
    try:
        for rendering in (render_overlay(name) for name in names) if names else documented():
            lines = list(findings(rendering)) + (_unreleased(rendering) if "--release" in arguments else [])
            wrong, documents, renderings = wrong + len(lines), documents + len(rendering.documents), renderings + 1
            print(f"{'WRONG' if lines else 'ok':6}{rendering.name}: {len(rendering.documents)} documents")
            print("".join(f"      {line}\n" for line in lines), end="")
        for line in _beside():
            wrong += 1
            print(f"      {line}")
    except SmeltError as error:
        print(f"WRONG {error}")
        return 1
    print(f"{renderings} renderings, {documents} documents, {len(POLICIES)} policies: {wrong} findings")
    return 1 if wrong or _alerts_fail() else 0


def _unreleased(rendering: Rendering) -> list[str]:
    return [
        f"digest: {image} has no digest yet; build it, then write its digest into the overlay"
        for image in unpinned(rendering)
    ]


def _beside() -> Iterator[str]:
    for path in sorted(TREE.glob("gitops/*/*.yaml")):
        yield from judge_file(path)
    yield from judge_file(_COMPOSE)
    if (command := docker_compose()) is None:
        print("docker compose is not installed (Debian 13: docker-compose): it was not asked about compose.yaml")
    else:
        yield from docker_errors(command, _COMPOSE)


def _alerts_fail() -> bool:
    promtool = shutil.which("promtool")
    if promtool is None:
        print("promtool is not installed (Debian: prometheus): the alerts were not tried")
        return False
    return subprocess.run([promtool, *_PROMTOOL], check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
