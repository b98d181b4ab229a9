"""The checker of manifests is checked: each policy catches the mistake that it exists for, and passes what is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from policy_edits import Documents, Mistake
from policy_mistakes import MISTAKES, OF_MACHINES, OF_ONE_NODE, OF_RECIPES

from scripts.manifests.capacity import taken
from scripts.manifests.check import findings
from scripts.manifests.render import ROOT, Rendering, catalogue, render_components, render_overlay
from scripts.manifests.tree import POLICIES, Tree
from smeltkit import limits


@cache
def production() -> Rendering:
    return render_overlay("production")


@cache
def machines() -> Rendering:
    return render_components("several-machines", catalogue().combinations["several-machines"])


@cache
def one_node() -> Rendering:
    return render_components("one-node-with-a-gpu", catalogue().combinations["one-node-with-a-gpu"])


@cache
def recipes() -> Rendering:
    return render_components("recipes", ["argo-workflows"])


def test_the_docs_tell_what_one_node_must_have() -> None:
    """What pods that stay ask for together, and the largest of those that a rollout starts beside the old one."""
    tree = Tree(one_node())
    staying = [load for load in tree.workloads if not load.is_job]
    copies = {load.name: int(load.spec.get("replicas", 1)) for load in staying}
    cpus, memory = (
        sum(copies[load.name] * taken(load, f"requests.{name}") for load in staying) for name in ("cpu", "memory")
    )
    largest = max(taken(load, "requests.memory") for load in staying)
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert f"ask for: {cpus:g} CPUs and {memory / limits.GIB:g} GiB of memory" in text
    assert f"besides: 2 CPUs and {largest / limits.GIB:g} GiB" in text


@pytest.mark.parametrize("rendering", [production, machines, one_node, recipes])
def test_what_is_deployed_breaks_no_policy(rendering: Callable[[], Rendering]) -> None:
    assert list(findings(rendering())) == []


SEEDED = [(production, MISTAKES), (machines, OF_MACHINES), (one_node, OF_ONE_NODE), (recipes, OF_RECIPES)]


@pytest.mark.parametrize(
    ("rendering", "policy", "words", "mistake"),
    [(rendering, *each) for rendering, mistakes in SEEDED for each in mistakes],
    ids=[f"{name}: {words}" for _, mistakes in SEEDED for name, words, _ in mistakes],
)
def test_a_seeded_mistake_is_caught_by_its_policy(
    rendering: Callable[[], Rendering], policy: str, words: str, mistake: Mistake
) -> None:
    """The finding stands under the policy's name and says what is wrong."""
    originals = list(rendering().documents)
    documents: Documents = copy.deepcopy(originals)
    mistake(documents)
    # Judgements are remembered an object: what was not spoilt is not judged again.
    spoilt = [originals[originals.index(item)] if item in originals else item for item in documents]
    found = list(findings(replace(rendering(), name="spoilt", documents=tuple(spoilt))))
    assert any(line.startswith(f"{policy}: ") and words in line for line in found), found


def test_every_policy_has_a_mistake_that_it_catches() -> None:
    assert set(POLICIES) | {"schema"} == {name for _, mistakes in SEEDED for name, _, _ in mistakes}
