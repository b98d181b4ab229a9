"""What is done with recipes, on this machine and as the tasks of a cluster."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import yaml

from gateway import stack
from gateway.stack.components import platform_config
from gateway.stack.state import StackState, load_credentials
from smeltkit.bus import Bus
from smeltkit.bus.subjects import STAGES_BUCKET
from tests.e2e.argo_executor import executed
from tests.e2e.conftest import MODEL, ROOT, Smelt
from tests.e2e.verb_cases import case

STAGES = {
    "start": {"import": {"source": "ore-11m", "name": "ore-11m"}},
    "taught": {"train": {"file": "training/training.yaml", "base": {"stage": "start"}}},
    "small": {"quantize": {"ref": {"stage": "taught"}, "scheme": "Q8_0", "name": "ore-11m:taught-small"}},
}
"""The import and the training that other verbs do as well, so that here they are found, and what comes of them."""


def written(folder: Path) -> Path:
    """The recipe in a file, beside it what it names."""
    (folder / "ore-11m").symlink_to(MODEL)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"recipe": "tiny", "stages": STAGES}))
    return file


def made(document: dict[str, Any]) -> dict[str, str]:
    """What the stages of a run made, by name."""
    return {stage["name"]: stage["digest"] for stage in document["stages"]}


@case("recipe plan")
def recipe_plan(smelt: Smelt, _: Any, folder: Path) -> None:
    file = written(folder)
    training = folder / "training" / "training.yaml"
    training.write_text(training.read_text().replace("epochs", "epoch"))
    file.write_text(file.read_text().replace("Q8_0", "Q9_0"))
    done = smelt.run("recipe", "plan", str(file), "--json")
    planned = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert done.returncode == 2 and "did you mean epochs?" in str(planned["taught"]["refusals"]), (
        "R-006: a key that its stage does not read is refused before the stages before it have run"
    )
    assert planned["start"]["state"] == "stored" and planned["small"]["plan"] is None
    assert "scheme 'Q9_0' is not known; known are" in str(planned["small"]["refusals"]), "nor is there its bundle yet"


@case("recipe run")
def recipe_run(smelt: Smelt, _: Any, folder: Path) -> None:
    file = written(folder)
    first, again = smelt("recipe", "run", str(file)), smelt("recipe", "run", str(file))
    assert made(first) == made(again) and all(stage["is_cached"] for stage in again["stages"])
    assert {stage["state"] for stage in first["stages"]} == {"succeeded"} and len(set(made(first).values())) == 3


@case("recipe show")
def recipe_show(smelt: Smelt, _: Any, folder: Path) -> None:
    file = written(folder)
    run = smelt("recipe", "run", str(file))
    shown = smelt("recipe", "show", str(file))
    assert made(shown) == made(run)
    assert [stage["inputs"] for stage in shown["stages"]] == [stage["inputs"] for stage in run["stages"]]
    assert shown["stages"][2]["inputs"] == {"ref": [made(run)["taught"]]}


@case("recipe pin")
def recipe_pin(smelt: Smelt, _: Any, folder: Path) -> None:
    pinned = yaml.safe_load(smelt("recipe", "pin", str(written(folder)))["text"])
    assert set(pinned["files"]) == {"training/rows.jsonl", *(f"ore-11m/{path.name}" for path in MODEL.iterdir())}
    assert pinned["stages"]["taught"]["train"]["base"] == {"stage": "start"}


@case("recipe stage")
def recipe_stage(smelt: Smelt, _: Any, folder: Path) -> None:
    file, result = written(folder), folder / "digest"
    document = smelt("recipe", "stage", str(file), "start", "--result", str(result))
    assert result.read_text() == made(document)["start"] and document["stages"][0]["is_cached"]
    assert smelt.run("recipe", "stage", str(file), "taught").returncode == 2, "it was told nothing of start"


@case("recipe argo")
def recipe_argo(smelt: Smelt, _: Any, folder: Path) -> None:
    refused = smelt.run("recipe", "argo", str(written(folder)), "--image", "gateway:1")
    assert refused.returncode == 2 and "smelt recipe pin recipe.yaml > pinned.yaml" in refused.stderr
    file = folder / "hub.yaml"
    file.write_text('{recipe: hub, stages: {start: {import: {source: "hf://a/b", name: b}}}}')
    made = smelt.run("recipe", "argo", str(file), "--image", "gateway:1")
    assert yaml.safe_load(made.stdout)["spec"]["templates"][1]["container"]["image"] == "gateway:1"


def pods_and_here(smelt: Smelt, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What the stages make as the tasks of a Workflow, and what `recipe run` made, which by then is forgotten."""
    file = written(folder)
    here = made(smelt("recipe", "run", str(file)))
    pinned = folder / "elsewhere" / "pinned.yaml"
    pinned.parent.mkdir()
    pinned.write_text(smelt("recipe", "pin", str(file))["text"])
    workflow = smelt("recipe", "argo", str(pinned), "--image", "gateway:1")
    asyncio.run(_forget(smelt.home, set(here.values())))
    # A platform of one machine has no token.
    brought = {"gateway.smelt.svc:50051": stack.status(smelt.home).gateway_grpc, "/etc/smelt/secrets/rpc-token": ""}
    there = executed(workflow, folder / "pods", brought, ROOT)
    assert not any(job["is_cached"] for job in smelt("jobs", "ls")["jobs"][: len(there)]), "it was all done again"
    return there, here


async def _forget(home: Path, digests: set[str]) -> None:
    """Takes these results out of what stages know to be stored, as on a platform that never made them."""
    state = StackState.load(home)
    assert state is not None
    bus = await Bus.connect(platform_config(state, load_credentials(home)), name="test")
    try:
        bucket = bus.bucket(STAGES_BUCKET)
        known = [entry for entry in await bucket.entries() if entry.value.decode() in digests]
        assert {entry.value.decode() for entry in known} == digests
        for entry in known:
            await bucket.delete(entry.key, entry.revision)
    finally:
        await bus.close()
