"""The checker of manifests is checked: each policy catches the mistake that it exists for, and passes what is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from policy_edits import Documents, Mistake
from policy_mistakes import MISTAKES, OF_MACHINES

from scripts.manifests.check import findings
from scripts.manifests.render import Rendering, catalogue, render_components, render_overlay
from scripts.manifests.tree import POLICIES


@cache
def production() -> Rendering:
    return render_overlay("production")


@cache
def machines() -> Rendering:
    return render_components("several-machines", catalogue().combinations["several-machines"])


@pytest.mark.parametrize("rendering", [production, machines])
def test_what_is_deployed_breaks_no_policy(rendering: Callable[[], Rendering]) -> None:
    assert list(findings(rendering())) == []


@pytest.mark.parametrize(
    ("rendering", "policy", "words", "mistake"),
    [*((production, *each) for each in MISTAKES), *((machines, *each) for each in OF_MACHINES)],
    ids=[f"{name}: {words}" for name, words, _ in (*MISTAKES, *OF_MACHINES)],
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
    assert set(POLICIES) | {"schema"} == {name for name, _, _ in (*MISTAKES, *OF_MACHINES)}
