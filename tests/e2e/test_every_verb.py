"""R-107: every verb of the command line is run from end to end on the shipped model, and what it brought about is seen.

The verbs come from the parser itself: one without a case here fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from tests.e2e.conftest import Smelt
from tests.e2e.verb_cases import CASES, SMALL, SUITE

MODULES = tuple(f"tests.e2e.verbs_{theme}" for theme in ("models", "platform", "recipes", "scores", "training"))
pytest.register_assert_rewrite(*MODULES)
for module in MODULES:
    import_module(module)


def verbs() -> Iterator[str]:
    """Every command and sub-command that the parser knows, e.g. "jobs ls"."""
    for name in main._COMMANDS:
        below = getattr(main._load(name), "commands", {})
        yield from (f"{name} {verb}" for verb in below) if below else (name,)


@pytest.fixture(scope="module")
def reports(smelt: Smelt) -> list[dict[str, Any]]:
    """Two evaluations of four problems each."""
    return [smelt("eval", *SUITE, "--limit", "4", "--seed", str(seed), SMALL) for seed in (201, 202)]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a pre-training that takes it to some words, and of a sweep, of which it is the first run."""
    folder = tmp_path_factory.mktemp("training")
    rows = [{"text": f"The number after {number} is {number + 1}."} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"layers": 1, "hidden_size": 64, "intermediate_size": 128, "heads": 2, "kv_heads": 1}
    settings = {"method": "pretrain", "init": "random", "shape": shape, "epochs": 20, "sequence_tokens": 128,
                "packs_per_step": 2, "learning_rate": 1e-2}  # fmt: skip
    whole = {"base": "ore-11m", "data": "rows.jsonl", "heldout": "rows.jsonl", "name": "ore-11m:taught", **settings}
    file = folder / "training.yaml"
    file.write_text(json.dumps(whole))
    sweep = {"keys": {"learning_rate": [1e-2, 2e-2]}}
    (folder / "sweep.yaml").write_text(json.dumps({**whole, "name": "ore-11m:swept", "sweep": sweep}))
    return file


@pytest.fixture(scope="module")
def swept(smelt: Smelt, training: Path) -> dict[str, Any]:
    """The finished sweep."""
    return smelt("train", "sweep", str(training.parent / "sweep.yaml"))


@pytest.mark.parametrize("verb", list(verbs()))
def test_verb_does_what_it_says(
    verb: str,
    smelt: Smelt,
    reports: list[dict[str, Any]],
    training: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Not that it ends with 0: that its effect is there."""
    shutil.copytree(training.parent, tmp_path / "training")
    assert verb in CASES, f"`smelt {verb}` has no case here; add one that shows its effect"
    is_about_sweep = "swept" in signature(CASES[verb]).parameters
    CASES[verb](smelt, request.getfixturevalue("swept") if is_about_sweep else reports, tmp_path)


def test_recipe_makes_the_same_on_this_machine_and_as_the_tasks_of_a_workflow(
    smelt: Smelt, training: Path, tmp_path: Path
) -> None:
    """R-126: import, training and quantization of one file: digest by digest, each done twice."""
    from tests.e2e.verbs_recipes import pods_and_here

    shutil.copytree(training.parent, tmp_path / "training")
    there, here = pods_and_here(smelt, tmp_path)
    assert there == here and len(set(here.values())) == 3
