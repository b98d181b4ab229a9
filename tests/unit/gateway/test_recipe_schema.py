"""Recipes as they are read: every key is some verb's, references meet, and what is wrong is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.cli.training_file import trainings
from gateway.recipes.schema import Recipe
from smeltkit.errors import BadConfig, SmeltError

ROOT = Path(__file__).resolve().parents[3]
STAGES = """recipe: tiny
stages:
  start:
    import: {source: ore, name: ore}
  taught:
    train: {base: {stage: start}, data: {a.jsonl: 1, b.jsonl: 2}, heldout: c.jsonl, name: "ore:taught", seed: 3}
  score:
    eval: {ref: {stage: taught}, suite: basic, limit: 4, temperature: 1e-1}
  first:
    eval: {ref: "ore:old", suite: basic}
  kept:
    compare: {baseline: {stage: first}, candidate: {stage: score}, must: not-worse}
  gate:
    gate: {ref: {stage: taught}, report: [{stage: score}], clause: ["basic pass@1 >= 0.5"]}
  small:
    quantize: {ref: {stage: taught}, scheme: Q8_0, name: "ore:small"}
    after: [gate]
"""


def recipe(text: str = STAGES, folder: Path = Path("folder")) -> Recipe:
    """The recipe of a text, as if it were in a file of `folder`."""
    return Recipe.of(yaml.safe_load(text), folder / "tiny.yaml")


def test_a_recipe_reads_as_it_is_written_and_orders_its_stages() -> None:
    """What is written out again is the same recipe; defaults are those of the commands."""
    found = recipe()
    assert list(found.stages) == ["start", "first", "taught", "score", "kept", "gate", "small"]
    assert found.stages["score"].values["samples"] == 1 and found.stages["score"].values["temperature"] == 0.1
    assert found.stages["small"].needs == ("taught", "gate") and found.stages["start"].gives == "ore:latest"
    again = recipe(found.text())
    assert again.text() == found.text() and again.stages == found.stages


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("recipe: tiny", "recipe: tiny\nstage: {}", r"nothing reads stage; did you mean stages\?"),
        ("import: {", "imports: {", r"stages.start.imports is no key of a stage; did you mean stages.start.import\?"),
        ("after: [gate]", "afer: [gate]", r"stages.small.afer is no key of a stage; did you mean stages.small.after\?"),
        ("limit: 4", "limits: 4", r"score.eval.limits is no key of .*; did you mean stages.score.eval.limit\?"),
        ("limit: 4", "wait: false", "score.eval.wait is no key of such a stage"),
        ("limit: 4", "limit: -1", r"score.eval.limit=-1 must be a whole number, 0 to 100000"),
        ("limit: 4", "limit: 1.5", r"score.eval.limit=1.5 must be a whole number"),
        ("limit: 4", "limit: true", r"score.eval.limit=True must be a whole number"),
        ("scheme: Q8_0, ", "", r"stages.small.quantize.scheme is missing"),
        ('scheme: Q8_0, name: "ore:small"', "scheme: Q8_0", r"stages.small.quantize.name is missing"),
        ('"ore:small"', "Ore", r"'Ore' is not a name"),
        ('"ore:small"', '"ore:taught"', "stages taught and small both give the name ore:taught; change one"),
        ('ref: "ore:old"', "ref: ore", r"first: ref is ore, the name that stage start gives; write {stage: start}"),
        ("base: {stage: start}, ", "", r"train.base is missing: a bundle, as {stage: NAME} or by its name or digest"),
        ("base: {stage: start}", "base: {stages: start}", r"base={'stages': 'start'} must be {stage: NAME}"),
        ("base: {stage: start}", "base: {stage: strat}", r"strat, which is no stage; did you mean start\?"),
        ("base: {stage: start}", "base: {stage: taught}", "names the stage itself"),
        ("base: {stage: start}", "base: {stage: small}", "stages wait for each other: .*small"),
        ("base: {stage: start}", "base: {stage: score}", "takes a bundle, but score makes a report; a bundle comes of"),
        ("candidate: {stage: score}", "candidate: {stage: gate}", "takes a report, but gate makes nothing"),
        ("report: [{stage: score}]", "report: {stage: score}", r"gate.report=.* must be a list of one or more"),
        ("after: [gate]", "after: [gate, gate]", "must be a list of stages, each once"),
        ("after: [gate]", "after: [gates]", r"after names gates, which is no stage; did you mean gate\?"),
        ("must: not-worse", "must: best", "must='best' is no demand on a comparison; allowed are better and not-worse"),
        ("seed: 3", "adapters: []", "train.adapters: a stage makes one whole model"),
        ("seed: 3", "vram: 40", "vram=40 must be a size such as 40GiB"),
        ("heldout: c.jsonl", "heldout: [c.jsonl]", r"stages.taught.train: .*heldout=\['c.jsonl'\] must be one file"),
        ("scheme: Q8_0", "scheme: yes", r"quantize.scheme is read as true, which is no text; put it in quotes"),
        ("scheme: Q8_0", "scheme: ", r"quantize.scheme has no value; write one"),
        ("limit: 4", "limit: ", r"eval.limit has no value; write one"),
        ('"ore:taught"', "17", r"taught.train: .*name, .*, is read as 17, which is no text; put it in quotes"),
        ('"ore:old"', "12345678", r"first.eval.ref is read as 12345678, .* in quotes, or {stage: NAME}"),
        ("recipe: tiny", "recipe: no", "the name of recipe is read as false, which is no text; put it in quotes"),
        ("recipe: tiny", "recipe: Tiny", "'Tiny' cannot be the name of recipe"),
        ("recipe: tiny", "recipe: tiny\nfiles: {d.jsonl: {}}", "files.d.jsonl.size_bytes=None must be"),
        ("recipe: tiny", f"recipe: tiny\nfiles: {{d.jsonl: {{digest: 'sha256:{'0' * 64}', size_bytes: 1}}}}",
         "no stage reads d.jsonl"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_say(old: str, new: str, says: str) -> None:
    """R-006: a key that nothing reads, a reference that does not meet, a value out of range: refused by its name."""
    assert STAGES.count(old) == 1 or old in ("import: {", "limit: 4", "recipe: tiny")
    with pytest.raises(SmeltError, match=says):
        recipe(STAGES.replace(old, new, 1))


def test_a_training_file_is_taken_over_with_its_data_where_it_lies(tmp_path: Path) -> None:
    """A stage may say a training anew in part; paths of the file stay those of its folder."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "training.yaml").write_text(
        "base: ore\nname: ore:x\nheldout: h.jsonl\nlora: {rank: 4, alpha: 8}\n"
        "stages:\n  - {data: a.jsonl, epochs: 1}\n  - {data: {b.jsonl: 2}}\n"
    )
    text = "recipe: x\nstages:\n  made: {train: {file: sub/training.yaml, lora: {rank: 2}, base: ore-2}}\n"
    stage = recipe(text, tmp_path).stages["made"]
    assert stage.edges[0].reference == "ore-2" and stage.given["lora"] == {"rank": 2, "alpha": 8}
    assert stage.kind.missing(stage, {}) == ["sub/a.jsonl", "sub/b.jsonl", "sub/h.jsonl"]
    with pytest.raises(BadConfig, match="use `smelt train sweep"):
        recipe(text.replace("base: ore-2", "sweep: {keys: {seed: [1, 2]}}"), tmp_path)


def test_shipped_recipes_are_read() -> None:
    """Each, with the training that it names."""
    found: dict[str, Any] = {path.stem: Recipe.read(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    assert found and all(name == one.name for name, one in found.items())
    assert trainings(found["refine"].stages["refined"].values["training"], Path("x"))[0]["method"] == "lora"
