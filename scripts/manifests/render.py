"""Renders overlays and combinations of components, and refuses combinations that exclude each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from scripts.manifests.workflows import sampled
from smeltkit.errors import BadConfig

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "deploy" / "k8s"
PINNED = ("production", "air-gapped")
"""Overlays whose images are digests."""
_RENDER_TIMEOUT_S = 60.0
_BUILD = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}

_RANGES = {
    "s3-clients": {"external-s3"},
    "backup-place": {"external-s3", "backup"},
    "recipe": {"argo-workflows"},
}
"""Policies that open no range before an overlay names one, and the components that bring them."""

Document = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A value that an overlay gives a key of a ConfigMap."""

    config_map: str
    namespace: str
    key: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a cluster would get: the documents of one overlay or combination."""

    name: str
    documents: tuple[Document, ...]
    is_pinned: bool = False
    """Whether its images must be digests."""
    nodes: int = 0
    """Nodes of its cluster; 0 where there are as many as its pods ask for."""
    declared: tuple[Declared, ...] = ()
    """What the overlay itself says of settings."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Components of which at most one may be chosen; `default` is there unless another is."""

    name: str
    members: tuple[str, ...]
    default: str = ""


class Catalogue:
    """`deploy/k8s/components.yaml`: which components exclude or need each other, and what is rendered together."""

    def __init__(self, text: str) -> None:
        read = yaml.safe_load(text)
        self.groups = [
            Group(name=name, members=tuple(group["members"]), default=group.get("default", ""))
            for name, group in read["groups"].items()
        ]
        self.needs: Mapping[str, Sequence[str]] = read["needs"]
        self._nodes: Mapping[str, int] = read["nodes"]
        self.outside: Sequence[str] = read["outside"]
        self.combinations: Mapping[str, Sequence[str]] = read["combinations"]

    def complete(self, components: Sequence[str]) -> list[str]:
        """What `components` need, then they, then defaults of groups left open: images are named once all are there."""
        chosen: list[str] = []
        for name in components:
            chosen += [found for found in (*self._before(name), name) if found not in chosen]
        open_groups = [group for group in self.groups if group.default and not set(group.members) & set(chosen)]
        chosen += [group.default for group in open_groups]
        return sorted(chosen, key=lambda name: name == "images")

    def _before(self, name: str) -> list[str]:
        """What a component changes or rests on, and what that does."""
        return [found for needed in self.needs.get(name, ()) for found in (*self._before(needed), needed)]

    def nodes(self, components: Sequence[str]) -> int:
        """Nodes of a cluster with `components`; 0 for as many as are asked for."""
        return min((self._nodes[name] for name in components if name in self._nodes), default=0)

    def check(self, name: str, components: Sequence[str]) -> None:
        """BadConfig if two of `components` exclude each other, or one is unknown, or not after what it needs."""
        known = sorted(path.parent.name for path in TREE.glob("components/*/kustomization.yaml"))
        for component in components:
            if component not in known:
                raise BadConfig(f"{name}: component {component!r} does not exist; known: {', '.join(known)}")
            for needed in self.needs.get(component, ()):
                if needed not in components:
                    raise BadConfig(f"{name}: component {component} needs {needed}; add it")
                if components.index(needed) > components.index(component):
                    raise BadConfig(
                        f"{name}: component {component} changes what {needed} brings; list it after {needed}"
                    )
        for group in self.groups:
            both = [component for component in components if component in group.members]
            if len(both) > 1:
                raise BadConfig(f"{name}: {' and '.join(both)} exclude each other ({group.name}); keep one")


@cache
def catalogue() -> Catalogue:
    """The catalogue of this tree."""
    return Catalogue((TREE / "components.yaml").read_text())


def overlays() -> list[str]:
    """Names of all overlays."""
    return sorted(path.parent.name for path in TREE.glob("overlays/*/kustomization.yaml"))


def render_overlay(name: str) -> Rendering:
    """The documents of an overlay; BadConfig if it does not render or mixes what excludes each other."""
    folder = TREE / "overlays" / name
    if not folder.is_dir():
        raise BadConfig(f"overlay {name!r} does not exist; known: {', '.join(overlays())}")
    written = yaml.safe_load((folder / "kustomization.yaml").read_text())
    components = [Path(path).name for path in written.get("components", ())]
    catalogue().check(f"overlay {name}", components)
    return Rendering(
        name=name,
        documents=_with_pods(kustomized(folder)),
        is_pinned=name in PINNED,
        nodes=catalogue().nodes(components),
        declared=tuple(declared(written, folder)),
    )


def _with_pods(documents: Iterator[Document]) -> tuple[Document, ...]:
    """The documents, and a Workflow for those whose pods only ever come of one."""
    found = tuple(documents)
    return (*found, *sampled(found))


def declared(written: Mapping[str, Any], folder: Path) -> Iterator[Declared]:
    """The settings that a kustomization in `folder` gives itself, by literals and files of them."""
    for generated in written.get("configMapGenerator", ()):
        lines = [*generated.get("literals", ())]
        for file in generated.get("envs", ()):
            lines += (folder / file).read_text().splitlines()
        for key, equals, value in (line.partition("=") for line in lines):
            if equals and not key.startswith("#"):
                namespace = generated.get("namespace", written.get("namespace", ""))
                yield Declared(config_map=generated["name"], namespace=namespace, key=key, value=value)


def render_components(name: str, components: Sequence[str]) -> Rendering:
    """The documents of the base with `components` and their defaults, under the label `name`."""
    chosen = catalogue().complete(components)
    catalogue().check(name, chosen)
    with tempfile.TemporaryDirectory(prefix="smelt-render-") as folder:
        up = os.path.relpath(TREE, Path(folder).resolve())
        build: dict[str, Any] = _BUILD | {
            "resources": [f"{up}/base"],
            "components": [f"{up}/components/{part}" for part in chosen],
        }
        if "external-s3" in chosen:
            address = "SMELT_PLATFORM_S3_ENDPOINT=s3.example.com:443"
            merged = {"name": "platform", "namespace": "smelt", "behavior": "merge", "literals": [address]}
            build["configMapGenerator"] = [merged]
        place = [{"op": "replace", "path": "/spec/egress/0/to", "value": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}]
        names = [name for name, parts in _RANGES.items() if parts <= set(chosen)]
        targets = [{"kind": "NetworkPolicy", "name": name} for name in names]
        build["patches"] = [{"patch": yaml.safe_dump(place), "target": target} for target in targets]
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(build))
        documents = _with_pods(kustomized(Path(folder)))
        own = tuple(declared(build, Path(folder)))
        return Rendering(name=name, documents=documents, nodes=catalogue().nodes(chosen), declared=own)


def documented() -> Iterator[Rendering]:
    """Every overlay, every component alone, and every combination of the catalogue."""
    for name in overlays():
        yield render_overlay(name)
    for path in sorted(TREE.glob("components/*/kustomization.yaml")):
        yield render_components(f"base with {path.parent.name}", [path.parent.name])
    for name, components in catalogue().combinations.items():
        yield render_components(name, components)


def parse(text: str) -> Iterator[Document]:
    """The documents of a YAML text. Equal texts are the same object, so that judging one judges all."""
    for part in text.split("\n---\n"):
        if part.strip():
            yield _parse_one(part)


def kustomized(folder: Path) -> Iterator[Document]:
    """The documents of a folder as `kubectl kustomize` makes them; BadConfig if it does not render."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise BadConfig("kubectl is not installed; manifests are rendered with kubectl 1.27 or newer (kustomize 5)")
    command = [kubectl, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_RENDER_TIMEOUT_S, check=False)
    if done.returncode:
        raise BadConfig(f"{folder.name} does not render: {done.stderr.strip()}")
    return parse(done.stdout)


@cache
def _parse_one(text: str) -> Document:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: Document = yaml.load(text, Loader=loader)
    return document
