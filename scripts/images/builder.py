"""Builds images with buildah: no daemon, no registry. Needs root, or a user namespace (`buildah unshare`).

Everything lies below one folder, which `clean` removes. Where the public base cannot be pulled, debootstrap makes one
from Debian. Where this machine gets packages from is lent to the build and left in no image: settings of apt and pip
are mounted under /run/machine, which only the build sees. LLAMA_CPUS names the kinds of CPU to build llama.cpp for, all
unless set; LLAMA_PORTABLE a folder in which `install_llama.py --portable` did that before, on Debian 12.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.images.catalogue import CONTAINERFILE, ROOT, Image, labels
from smeltkit.errors import BadConfig

LENT = "/run/machine"
BASE = "localhost/debian-base:bookworm"
DRIVERS = ("overlay", "vfs")
_TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap"}
# What the public slim image leaves out as well; licences stay.
_UNNEEDED = ("usr/share/locale", "usr/share/man", "usr/share/info", "var/cache/apt", "var/lib/apt/lists", "var/log")


class Builder:
    """Images below `folder`, made anew or taken from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        for tool, package in _TOOLS.items():
            if shutil.which(tool) is None:
                raise BadConfig(f"{tool} is not installed; install it (Debian: apt-get install {package})")

    @property
    def storage(self) -> tuple[str, ...]:
        """Options of buildah and podman that keep all below the folder."""
        return (
            f"--root={self.folder / 'storage'}",
            f"--runroot={self.folder / 'run'}",
            f"--storage-driver={self._driver}",
        )

    @cached_property
    def _driver(self) -> str:
        """The first storage driver that mounts here."""
        probe = self.folder / "probe"
        for driver in DRIVERS:
            options = [f"--root={probe}", f"--runroot={probe / 'run'}", f"--storage-driver={driver}"]
            made = subprocess.run(["buildah", *options, "from", "scratch"], capture_output=True, text=True)
            mounted = subprocess.run(["buildah", *options, "mount", made.stdout.strip()], capture_output=True)
            subprocess.run(["buildah", *options, "rm", "--all"], capture_output=True)
            shutil.rmtree(probe, ignore_errors=True)
            if made.returncode == 0 and mounted.returncode == 0:
                return driver
        raise BadConfig(f"buildah cannot mount an image here: {made.stderr.strip()[-300:]}; run it as root")

    def build(self, image: Image) -> None:
        """Builds one image; steps that were built before are taken from there."""
        command = ["build", "--isolation=chroot", "--layers", "--format=oci", f"--file={CONTAINERFILE}"]
        command += [f"--ignorefile={CONTAINERFILE}.dockerignore", f"--target={image.name}", f"--tag={image.tag}"]
        command += [f"--build-arg=LLAMA_CPUS={os.environ.get('LLAMA_CPUS', '')}"]
        command += [f"--build-arg=BASE={self._base}", *self._lent]
        command += [f"--label={name}={value}" for name, value in labels().items()]
        self.buildah(*command, str(ROOT))

    def config(self, image: Image) -> Mapping[str, Any]:
        """The image's own description in OCI's terms: `config` with user, command, labels."""
        told = self._told("inspect", "--type=image", image.tag)
        found: Mapping[str, Any] = json.loads(told)["OCIv1"]
        return found

    @contextmanager
    def mounted(self, image: Image) -> Iterator[Path]:
        """The root file system of the image, as it is unpacked on a node."""
        container = self._told("from", "--pull=never", image.tag).strip()
        try:
            yield Path(self._told("mount", container).strip())
        finally:
            self.buildah("rm", container, quiet=True)

    def save(self, image: Image, folder: Path) -> str:
        """Writes the image into `folder` as the OCI archive NAME.tar; the digest that it has there."""
        told, archive = self.folder / "digest", folder / f"{image.name}.tar"
        archive.unlink(missing_ok=True)
        self.buildah("push", "--quiet", f"--digestfile={told}", image.tag, f"oci-archive:{archive}:{image.tag}")
        return told.read_text().strip()

    def clean(self) -> None:
        """Removes every image and all that building left."""
        self.buildah("rm", "--all", quiet=True)
        self.buildah("rmi", "--all", "--force", quiet=True)
        shutil.rmtree(self.folder)

    def buildah(self, *arguments: str, quiet: bool = False) -> None:
        """Runs buildah; BadConfig if it fails, its own words stand above."""
        output = subprocess.DEVNULL if quiet else None
        done = subprocess.run(["buildah", *self.storage, *arguments], stdout=output, check=False)
        if done.returncode:
            raise BadConfig(f"buildah {arguments[0]} ended with {done.returncode}; the lines above say why")

    def _told(self, *arguments: str) -> str:
        done = subprocess.run(["buildah", *self.storage, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadConfig(f"buildah {arguments[0]} failed: {done.stderr.strip()[-300:]}; build the image first")
        return done.stdout

    @cached_property
    def _base(self) -> str:
        """The pinned public base if it can be pulled, else one that debootstrap makes here, once."""
        pinned = pinned_base()
        pull = ["buildah", *self.storage, "pull", "--quiet", pinned]
        if subprocess.run(pull, capture_output=True, check=False).returncode == 0:
            return pinned
        have = ["buildah", *self.storage, "inspect", "--type=image", BASE]
        if subprocess.run(have, capture_output=True, check=False).returncode:
            print(f"{pinned} cannot be pulled; debootstrap makes a base of the same Debian", flush=True)
            self._make_base()
        return BASE

    def _make_base(self) -> None:
        tree, archive = self.folder / "base", self.folder / "base.tar"
        shutil.rmtree(tree, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", "bookworm", str(tree), debian_mirror()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadConfig(f"debootstrap ended with {done.returncode}: {done.stdout.strip()[-400:]}")
        strip_base(tree)
        with tarfile.open(archive, "w") as tar:
            tar.add(tree, arcname=".")
        container = self._told("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(archive), "/")
        self.buildah("config", "--cmd=bash", container)
        self.buildah("commit", "--quiet", "--rm", container, BASE, quiet=True)
        archive.unlink()
        shutil.rmtree(tree)

    @cached_property
    def _lent(self) -> list[str]:
        """Options that lend the build this machine's settings of apt and pip."""
        folder = self.folder / "lent"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree("/etc/apt", folder / "apt", symlinks=True)
        (folder / "apt.conf").write_text(f'Dir::Etc "{LENT}/apt";\n')
        text, places = lent_pip_settings(
            subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
        )
        (folder / "pip.conf").write_text(text)
        volumes = [(str(folder), LENT)]
        if made := os.environ.get("LLAMA_PORTABLE"):
            places[made] = "llama"
        for place, name in places.items():
            if Path(place).is_file():
                shutil.copyfile(place, folder / name)
            else:
                (folder / name).mkdir()
                volumes.append((place, f"{LENT}/{name}"))
        return [
            f"--build-arg=APT_CONFIG={LENT}/apt.conf",
            f"--build-arg=PIP_CONFIG_FILE={LENT}/pip.conf",
            *(f"--build-arg=PIP_CERT={found}" for found in re.findall(r"^cert = (.+)$", text, flags=re.MULTILINE)),
            *(f"--volume={source}:{target}:ro" for source, target in volumes),
        ]


def pinned_base() -> str:
    """The base that the Containerfile names, by digest."""
    found = re.search(r"^ARG BASE=(\S+@sha256:[0-9a-f]{64})$", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    if found is None:
        raise BadConfig(f"{CONTAINERFILE.name} must name its BASE by digest")
    return found[1]


def debian_mirror() -> str:
    """The archive of Debian 12 that apt is set to on this machine."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in told.stdout.splitlines():
        if line.endswith(" bookworm"):
            return line.split()[0]
    raise BadConfig("apt knows no archive of Debian 12 (bookworm); build on Debian 12, or pull the base beforehand")


def strip_base(tree: Path) -> None:
    """Leaves out of a bootstrapped tree what the slim image leaves out, and where it came from."""
    for name in _UNNEEDED:
        for found in (tree / name).glob("*"):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    for found in (tree / "usr/share/doc").rglob("*"):
        if (found.is_file() or found.is_symlink()) and found.name != "copyright":
            found.unlink()
    (tree / "etc/apt/sources.list").unlink(missing_ok=True)
    for name in ("etc/hostname", "etc/resolv.conf"):
        (tree / name).unlink(missing_ok=True)


def lent_pip_settings(told: str) -> tuple[str, dict[str, str]]:
    """pip's settings for the build from `pip config list`, and the local paths in them by their name under LENT."""
    values: dict[str, list[str]] = {}
    for line in told.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("cert", "index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "default-timeout"):
            found = values.setdefault(name, [])
            found += [word for word in value.strip("'\"").split() if word not in found]
    places: dict[str, str] = {}

    def moved(word: str, is_index: bool) -> str:
        match = re.fullmatch(r"(?:file://(?:localhost)?)?(/.*)", word)
        if match is None:
            return word
        path = Path(match[1].rstrip("/"))
        lent = path.parent if is_index else path  # pages of an index point at files beside it
        name = places.setdefault(str(lent), f"place-{len(places)}")
        return word.replace(str(lent), f"{LENT}/{name}", 1)

    lines = [f"{key} = {' '.join(moved(word, 'index' in key) for word in words)}" for key, words in values.items()]
    return "\n".join(["[global]", *lines]) + "\n", places
