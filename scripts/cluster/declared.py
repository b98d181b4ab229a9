"""What an overlay says of each workload, with secrets that are made up for the moment."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from pathlib import Path

from scripts.manifests.render import ROOT, TREE, Document, Rendering, kustomized, render_overlay
from scripts.manifests.settings import mounted_secrets
from scripts.manifests.tree import Tree, Workload


class Overlay:
    """A rendered overlay. Secrets are random but for `known` ones, by name and key."""

    def __init__(self, name: str, known: Mapping[tuple[str, str], str]) -> None:
        self._name, self._secrets = name, dict(known)
        self._tree = Tree(render_overlay(name))

    def of_release(self, root: Path) -> Overlay:
        """The same overlay as the release in the checkout `root` has it, with the same secrets."""
        other = copy.copy(self)
        documents = tuple(kustomized(root / TREE.relative_to(ROOT) / "overlays" / self._name))
        other._tree = Tree(Rendering(name=self._name, documents=documents))
        return other

    def environment(self, workload: str) -> dict[str, str]:
        """What a pod of the workload starts with; variables that need the cluster stay as they are written."""
        return self._tree.environment(self._workloads[workload], self.secret)

    def mounts(self, workload: str) -> Mapping[str, Mapping[str, str]]:
        """Files of Secrets that a pod of the workload finds below its folders: text by name, by folder."""
        found: dict[str, dict[str, str]] = {}
        for path, (name, key) in mounted_secrets(self._workloads[workload]).items():
            found.setdefault(str(path.parent), {})[path.name] = self.secret(name, key)
        return found

    def module(self, workload: str) -> str:
        """The Python module that a pod of the workload runs."""
        words = list(self._workloads[workload].main["command"])
        assert words[:2] == ["python", "-m"], words
        return str(words[2])

    def files(self, config: str) -> Mapping[str, str]:
        """Files of a ConfigMap, whose name may end with the hash of its content."""
        found: list[Document] = [
            item for item in self._tree.of("ConfigMap") if item["metadata"]["name"].startswith(f"{config}-")
        ]
        files: Mapping[str, str] = found[0]["data"]
        return files

    def secret(self, name: str, key: str) -> str:
        """The value of a Secret, the same each time. A letter comes first: NATS reads digits as a number."""
        return self._secrets.setdefault((name, key), f"n{secrets.token_hex(20)}")

    @property
    def _workloads(self) -> Mapping[str, Workload]:
        return {load.name: load for load in self._tree.workloads}
