"""The pods of recipes, which no manifest holds: a Workflow as `smelt recipe argo` writes it, judged with the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.recipes.argo import ACCOUNT, Pods, workflow
from gateway.recipes.schema import Recipe

_RECIPE: Final = {
    "recipe": "sample",
    "stages": {
        "start": {"import": {"source": "hf://org/model@main", "name": "model"}},
        "small": {"quantize": {"ref": {"stage": "start"}, "scheme": "Q8_0", "name": "model:q8_0"}},
        "score": {"eval": {"ref": {"stage": "small"}, "suite": "basic"}},
        "gate": {"gate": {"ref": {"stage": "small"}, "report": [{"stage": "score"}], "clause": ["basic pass@1 > 0.5"]}},
    },
}
"""Every kind of edge, and no file."""


def sampled(documents: Sequence[Any]) -> list[Any]:
    """A Workflow with the gateway's image of `documents`, if they have its account; else none."""
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    if ("ServiceAccount", ACCOUNT) not in named or ("Deployment", "gateway") not in named:
        return []
    image = named["Deployment", "gateway"]["spec"]["template"]["spec"]["containers"][0]["image"]
    made = workflow(Recipe.of(_RECIPE, Path("sample.yaml")), Pods(image=image), 3600)
    made["metadata"]["name"] = made["metadata"].pop("generateName").rstrip("-")
    return [made]
