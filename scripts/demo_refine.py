"""The shipped model, refined: planned, fine-tuned by LoRA, merged, quantized, and compared with its start in pairs.

`recipes/refine.yaml` says what is done; here it is run by the commands that a person would type, and shown. A second
run finds every stage in the store and takes seconds.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from scripts.demo import ROOT, TABLE_WIDTH, console, smelt

RECIPE = ROOT / "recipes" / "refine.yaml"
_STAGES: dict[str, Any] = yaml.safe_load(RECIPE.read_text())["stages"]
TRAINING = (RECIPE.parent / _STAGES["refined"]["train"]["file"]).resolve()
SCHEME: str = _STAGES["refined-q8"]["quantize"]["scheme"]
SCORED = {"start-q8": "score-before", "refined-q8": "score-after"}
"""The two small models, the start first, each with the stage that scores it."""


def show_plan(plan: dict[str, Any]) -> None:
    """The facts of a plan, a line each."""
    time_s = f"{plan['time_s']:.0f} s" if plan["time_s"] else "n/a"
    forecast = {"time": time_s, "peak memory": f"{plan['memory_bytes'] / 2**20:.0f} MiB"}
    facts = {**forecast, **{item["name"]: item["value"].splitlines()[0] for item in plan["items"]}}
    for name, value in facts.items():
        console.print(f"  {name:>20}  {value}", markup=False)


def outcome_table(run: dict[str, Any]) -> Table:
    """What the training was forecast to take, and what it took."""
    table = Table("", "forecast", "outcome", title="the training")
    forms = {"time_s": "{:.0f} s", "memory_bytes": "{:,} bytes", "tokens": "{:,}"}
    for field, form in forms.items():
        said = form.format(run["forecast"][field]) if run["forecast"] else "n/a"
        table.add_row(field, said, form.format(run["outcome"][field]))
    change = run["heldout"]
    interval = f"{change['change']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
    table.add_row("held-out loss", "", f"{change['before']:.4f} -> {change['after']:.4f}, {interval}")
    return table


def score_table(reports: dict[str, dict[str, Any]], compared: dict[str, Any]) -> Table:
    """The scores before and after, by the names of the models, and the test of their difference in pairs."""
    table = Table("bundle", "basic pass@1 [95 %]", title=f"{SCHEME}, before and after")
    for name, report in reports.items():
        score = report["scores"][0]
        shown = (
            f"{score['passed']}/{score['problems']} = {score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"
        )
        table.add_row(name, shown)
    interval = f"{compared['difference']:+.1%} [{compared['low']:+.1%}, {compared['high']:+.1%}]"
    pairs = f"{len(compared['gained'])} gained, {len(compared['lost'])} lost, p = {compared['p_value']:.2g}"
    table.add_row("difference in pairs", f"{interval}, {pairs}: {compared['verdict']}")
    return table


def lineage(reference: str) -> Iterator[str]:
    """A line for every bundle from `reference` back to what was imported, each with what it was made from."""
    while True:
        artifact = smelt("inspect", reference)["artifact"]
        made = artifact["config"]["lineage"]
        is_first = made["operation"] == "import"
        inputs = " + ".join(digest.removeprefix("sha256:")[:12] for digest in made["inputs"])
        origin = f"{made['origin']}, {len(made['inputs'])} files" if is_first else inputs
        yield f"{artifact['digest'].removeprefix('sha256:')[:12]}  {made['operation']} of {origin}"
        if is_first:
            return
        reference = made["inputs"][0]


def main() -> int:
    """Exit status: 0, or that of the first command that failed."""
    started = time.monotonic()
    os.environ.setdefault("TRACEPARENT", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
    # Operations of so small a model are over before a second thread has begun: on busy cores two are slower than one.
    os.environ.setdefault("SMELT_TRAINER_THREADS", "1")
    smelt("up")
    smelt("recipe", "stage", str(RECIPE), "start")
    show_plan(next(one["plan"] for one in smelt("recipe", "plan", str(RECIPE))["stages"] if one["name"] == "refined"))
    made = {one["name"]: one for one in smelt("recipe", "run", str(RECIPE))["stages"]}
    trained = smelt("runs", "show", made["refined"]["digest"])
    reports = {made[small]["gives"]: smelt("report", made[score]["digest"]) for small, score in SCORED.items()}
    lines = list(lineage(made["refined-q8"]["digest"]))
    out = Console(highlight=False, width=TABLE_WIDTH)
    for table in (outcome_table(trained), score_table(reports, made["gain"]["found"])):
        out.print()
        out.print(table)
    out.print("\nlineage of the result, newest first", *lines, sep="\n  ", markup=False)
    out.print(f"\ntook {time.monotonic() - started:.0f} s; the platform is still up, `make down` stops it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
