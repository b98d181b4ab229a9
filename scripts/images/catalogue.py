"""Which images there are and what they promise: `deploy/docker/images.yaml`, typed."""

from __future__ import annotations

import hashlib
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from smeltkit.errors import BadRequest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker"
CONTAINERFILE = FOLDER / "Containerfile"
REVISION = "org.opencontainers.image.revision"


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image: `name` is its target in the Containerfile."""

    name: str
    module: str
    """What it runs by `python -m`."""
    budget_mib: int
    """Bytes of its unpacked root file system at most."""
    has_torch: bool = False
    """Whether torch may be inside."""
    needs: str = ""
    """What must be had to build it, e.g. `cuda`; such an image is built by name only."""

    profile: str = ""
    """Profile of the sandbox that it is there for; empty for other services."""

    @property
    def service(self) -> str:
        """The service that it runs, or `gateway`."""
        return self.module.rpartition(".")[2]

    @property
    def tag(self) -> str:
        """Its name with the version, as manifests write it before they put a registry in front."""
        return f"smelt/{self.name}:{version()}"


@cache
def document() -> Mapping[str, Any]:
    """The file as it stands."""
    found: Mapping[str, Any] = yaml.safe_load((FOLDER / "images.yaml").read_text())
    return found


@cache
def images() -> Mapping[str, Image]:
    """Every image by name."""
    return {name: Image(name=name, **facts) for name, facts in document()["images"].items()}


def chosen(names: Sequence[str]) -> list[Image]:
    """The images of these names, or all that need nothing special; BadRequest names one that there is not."""
    for name in names:
        if name not in images():
            raise BadRequest(f"{name!r} is no image; there are {', '.join(images())}")
    return [image for image in images().values() if (image.name in names if names else not image.needs)]


def labels() -> dict[str, str]:
    """What each image says of itself: version, revision of the source, and the digest of the wire contract."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "org.opencontainers.image.title": "smelt",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": version(),
        REVISION: described.stdout.strip() or "unknown",
        "dev.smelt.contract": contract(),
    }


def version() -> str:
    """The version of the project."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def contract() -> str:
    """Digest of the wire contract that the image speaks: of the descriptors of all services."""
    return "sha256:" + hashlib.sha256((ROOT / "contracts" / "interface" / "smelt.binpb").read_bytes()).hexdigest()
