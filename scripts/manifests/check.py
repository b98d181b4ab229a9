"""Everything that is wrong with a rendering, or with a file that no overlay holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.manifests import capacity, certificates, names, network, placement, pods, settings
from scripts.manifests.compose import compose_errors
from scripts.manifests.render import ROOT, TREE, Document, Rendering, parse
from scripts.manifests.schemas import judge
from scripts.manifests.tree import POLICIES, Tree

__all__ = [
    "capacity",
    "certificates",
    "findings",
    "judge_file",
    "names",
    "network",
    "placement",
    "pods",
    "settings",
    "unpinned",
]
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
    documents = list(parse(path.read_text()))
    for document in documents:
        lines = judge(document) or list(source_errors(document, documents))
        yield from (f"{where}: {document['kind']}: {line}" for line in lines)


def source_errors(document: Document, beside: Sequence[Document]) -> Iterator[str]:
    """What a GitOps resource names and is not there: folders of this tree, a source beside it, parts of the base."""
    spec, folders, named = document["spec"], [], []
    if document["kind"] == "ApplicationSet":
        chosen = [part["clusters"]["selector"]["matchExpressions"] for part in spec["generators"]]
        template = spec["template"]["spec"]["source"]["path"].partition("{{")[0]
        folders = [template + name for tests in chosen for test in tests for name in test["values"]]
        named = spec["template"]["spec"]["ignoreDifferences"]
    if document["kind"] == "Kustomization":
        folders, named, source = [spec["path"]], spec["healthChecks"], spec["sourceRef"]
        if (source["kind"], source["name"]) not in [(item["kind"], item["metadata"]["name"]) for item in beside]:
            yield f"{source['kind']} {source['name']} is not in this file; correct sourceRef"
    for folder in folders:
        if not (ROOT / folder / "kustomization.yaml").is_file():
            yield f"{folder} is no overlay of this tree; correct the path"
    for item in named:
        if not list((TREE / "base" / item["name"]).glob("kustomization.yaml")):
            yield f"{item['kind']} {item['name']} is not in the base; correct the name"


def unpinned(rendering: Rendering) -> list[str]:
    """Images that stand under a digest of zeros: none was built yet."""
    images = {container["image"] for load in Tree(rendering).workloads for container in load.containers}
    return sorted(image.removesuffix(_NOT_BUILT) for image in images if image.endswith(_NOT_BUILT))
