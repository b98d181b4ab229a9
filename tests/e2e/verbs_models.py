"""What is done with models: imported, looked at, made smaller, asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.e2e.conftest import MODEL, Smelt
from tests.e2e.verb_cases import SMALL, case


@case("import")
def import_(smelt: Smelt, _: Any, folder: Path) -> None:
    shutil.copytree(MODEL, folder / "other")
    with (folder / "other" / "README.md").open("a") as card:
        card.write("Another card makes another bundle.\n")
    made = smelt("import", str(folder / "other"), "--name", "other:v1")
    assert not made["job"]["is_cached"]
    named = {model["name"]: model for model in smelt("models")["models"]}
    assert named["other:v1"]["digest"] == made["artifact"]["digest"] != named["ore-11m:latest"]["digest"]


@case("models")
def models(smelt: Smelt, *_: Any) -> None:
    listed = {model["name"]: model["size_bytes"] for model in smelt("models")["models"]}
    assert listed[SMALL] == smelt("inspect", SMALL)["artifact"]["size_bytes"] < listed["ore-11m:latest"]


@case("inspect")
def inspect(smelt: Smelt, *_: Any) -> None:
    found = smelt("inspect", "ore-11m")
    count = sum(tensor["size_bytes"] for tensor in found["tensors"]) // 2
    assert count == found["parameters"] > 10**7, "every parameter takes two bytes in bf16"


@case("check")
def check(smelt: Smelt, *_: Any) -> None:
    done = smelt("check", SMALL)
    assert {"bytes", "tensors", "contract"} <= {entry["check"] for entry in done["report"]["config"]["checks"]}
    assert done["report"]["digest"] == done["job"]["result_digest"]


@case("quantize")
def quantize(smelt: Smelt, *_: Any) -> None:
    """The plan is held against what comes of it: size and name."""
    plan = smelt("quantize", "ore-11m", "--scheme", "Q4_0", "--plan")
    made = smelt("quantize", "ore-11m", "--scheme", "Q4_0")
    size_bytes = made["artifact"]["size_bytes"]
    assert not made["job"]["is_cached"] and not plan["refusals"] and made["artifact"]["config"]["scheme"] == "Q4_0"
    assert abs(plan["write_bytes"] - size_bytes) < 0.02 * size_bytes


@case("run")
def run(smelt: Smelt, *_: Any) -> None:
    reply = smelt("run", SMALL, "-", "--max-tokens", "8", stdin="Write a function that adds two numbers.")
    assert reply["text"] and (reply["completion_tokens"], reply["finish_reason"]) == (8, "length")


@case("chat")
def chat(smelt: Smelt, *_: Any) -> None:
    ask = "Write a function that adds two numbers."
    said = smelt.run("chat", SMALL, stdin=f"{ask}\n")
    assert (said.returncode, said.stdout.strip()) == (0, smelt("run", SMALL, ask)["text"].strip()) and said.stdout
