"""Everything that is wrong with a rendering, or with a file that no overlay holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scripts.manifests import capacity, certificates, network, placement, pods, settings
from scripts.manifests.compose import compose_errors
from scripts.manifests.render import ROOT, Rendering, parse
from scripts.manifests.schemas import judge
from scripts.manifests.tree import POLICIES, Tree

__all__ = ["capacity", "certificates", "findings", "judge_file", "network", "placement", "pods", "settings", "unpinned"]
_NOT_BUILT = "@sha256:" + "0" * 64


def findings(rendering: Rendering) -> Iterator[str]:
    """One line for each mistake: the policy (or `schema`), what it is about, and what would be right.

    Policies are asked only about documents of the right form: they rest on it.
    """
    misshapen = [(document, line) for document in rendering.documents for line in judge(document)]
    for document, line in misshapen:
        yield f"schema: {document['kind']} {document['metadata']['name']}: {line}"
    if misshapen:
        return
    tree = Tree(rendering)
    for name, policy in POLICIES.items():
        for line in policy(tree):
            yield f"{name}: {line}"


def judge_file(path: Path) -> Iterator[str]:
    """What is wrong with the form of a file of its own: GitOps resources, the compose file."""
    where = path.relative_to(ROOT)
    if path.name == "compose.yaml":
        yield from (f"{where}: {line}" for line in compose_errors(path))
        return
    for document in parse(path.read_text()):
        yield from (f"{where}: {document['kind']}: {line}" for line in judge(document))


def unpinned(rendering: Rendering) -> list[str]:
    """Images that stand under a digest of zeros: none was built yet."""
    images = {container["image"] for load in Tree(rendering).workloads for container in load.containers}
    return sorted(image.removesuffix(_NOT_BUILT) for image in images if image.endswith(_NOT_BUILT))
