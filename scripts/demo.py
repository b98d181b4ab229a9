"""The main job from end to end on the model in examples/: import, quantize, serve, generate, judge, score.

Runs the same `smelt` commands a person would type, under one trace, and ends with a table. A second run finds every
stage in the store and takes seconds. HumanEval is scored too where its data can be had: in $SMELT_DATA, or from where
it is published.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL, BASIC = ROOT / "examples" / "models" / "ore-11m", ROOT / "examples" / "data" / "basic.jsonl"
SCHEMES = ("F16", "Q8_0", "Q4_K_M")
DOWNLOAD_TIMEOUT_S = 15
TABLE_WIDTH = 126
PROMPT = "Write a function that returns the sum of the squares of the even numbers in a list."

console = Console(stderr=True, highlight=False, soft_wrap=True)


def smelt(*arguments: str) -> dict[str, Any]:
    """The JSON document that `smelt ARGUMENTS --json` prints; a failing command ends the demo with its exit code."""
    shown = [argument.removeprefix(f"{ROOT}/") for argument in arguments]
    console.print("$ smelt " + " ".join(repr(word) if " " in word else word for word in shown), style="bold")
    command = [sys.executable, "-m", "gateway.cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def evaluate(suite: str, data: Path, name: str) -> dict[str, Any]:
    """The report of one evaluation, whose score is told at once."""
    report = smelt("eval", "--suite", suite, "--data", str(data), name)
    console.print(f"  {name} on {suite}: {_percent(report['scores'][0])}", markup=False)
    return report


def difference(scheme: str, suite: str, baseline: dict[str, Any], report: dict[str, Any]) -> str:
    """One line: how `report` differs from `baseline`, tested in pairs."""
    found = smelt("compare", baseline["digest"], report["digest"])
    points, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    counts = f"{len(found['gained'])} gained, {len(found['lost'])} lost"
    interval = f"{points:+5.1f} points [{low:+.1f}, {high:+.1f}]"
    return f"{scheme:6}  {suite:9}  {interval:28}  {counts}, p = {found['p_value']:.3f}: {found['verdict']}"


def quantize(name: str, scheme: str) -> dict[str, Any]:
    """The job and the artifact of one quantization, whose size is told at once."""
    made = smelt("quantize", "ore-11m", "--scheme", scheme, "--name", name)
    console.print(f"  {name}: {made['artifact']['size_bytes'] / 2**20:.1f} MiB")
    return made


def humaneval_data(suites: dict[str, Any], cache: Path) -> tuple[Path | None, str]:
    """HumanEval's data file with the digest that the suite declares, or None and why it cannot be had."""
    suite = next(entry for entry in suites["suites"] if entry["name"] == "humaneval")
    known = [cache / suite["data_file"]]
    if os.environ.get("SMELT_DATA"):
        known.append(Path(os.environ["SMELT_DATA"]) / suite["data_file"])
    for path in known:
        if path.is_file() and _digest(path.read_bytes()) == suite["data_digest"]:
            return path, ""
    try:
        with urllib.request.urlopen(suite["data_url"], timeout=DOWNLOAD_TIMEOUT_S) as reply:
            data = reply.read()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        return (
            None,
            f"{suite['data_url']} cannot be reached ({error}); "
            f"put {suite['data_file']} into a folder and set SMELT_DATA to it",
        )
    if _digest(data) != suite["data_digest"]:
        return None, f"{suite['data_url']} gave other bytes than the suite declares"
    cache.mkdir(parents=True, exist_ok=True)
    known[0].write_bytes(data)
    return known[0], ""


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _percent(score: dict[str, Any]) -> str:
    low, high = 100 * score["low"], 100 * score["high"]
    return f"{score['passed']}/{score['problems']} = {100 * score['value']:.1f} % [{low:.1f}, {high:.1f}]"


def _row(name: str, artifact: dict[str, Any], reports: dict[str, dict[str, Any]], is_cached: bool) -> list[str]:
    tokens = sum(report["completion_tokens"] for report in reports.values())
    seconds = sum(report["generate_s"] for report in reports.values())
    cells = [name, f"{artifact['size_bytes'] / 2**20:.1f} MiB", artifact["digest"].removeprefix("sha256:")[:12]]
    cells += [_percent(report["scores"][0]) for report in reports.values()]
    return [*cells, f"{tokens / seconds:.0f}" if seconds else "-", "stored" if is_cached else "made now"]


def _trace_summary(spans: list[dict[str, Any]]) -> str:
    """One line a caller and callee in different processes: how often, and for how long in all."""
    known = {span["span_id"]: span for span in spans}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for span in spans:
        parent = known.get(span["parent_id"])
        if parent is not None and parent["service"] != span["service"]:
            key = (parent["service"], span["service"], span["name"].split("/")[-1])
            seconds.setdefault(key, []).append((span["end_ns"] - span["start_ns"]) / 1e9)
        elif span["name"].startswith("publish "):
            seconds.setdefault((span["service"], "events", span["name"].removeprefix("publish ")), []).append(0.0)
    services = len({span["service"] for span in spans})
    lines = [f"one trace, {len(spans)} spans of {services} processes:"]
    for (caller, callee, name), times in sorted(seconds.items()):
        lines.append(f"  {caller:>9} -> {callee:<9}  {len(times):5} x  {name:<28}  {sum(times):8.1f} s")
    return "\n".join(lines)


def main() -> int:
    """Exit status: 0, or that of the first command that failed."""
    started = time.monotonic()
    os.environ.setdefault("TRACEPARENT", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
    smelt("up")
    source = smelt("import", str(MODEL), "--name", "ore-11m")
    suites = {"basic": BASIC}
    path, problem = humaneval_data(smelt("suites"), ROOT / ".smelt" / "data")
    if path:
        suites["humaneval"] = path
    rows = [
        [
            "bf16 (source)",
            *_row("", source["artifact"], {}, source["job"]["is_cached"])[1:3],
            *["as F16"] * len(suites),
            "",
            "stored" if source["job"]["is_cached"] else "made now",
        ]
    ]
    first: dict[str, dict[str, Any]] = {}
    differences = []
    for scheme in SCHEMES:
        name = f"ore-11m:{scheme.lower()}"
        made = quantize(name, scheme)
        reports = {suite: evaluate(suite, data, name) for suite, data in suites.items()}
        is_cached = made["job"]["is_cached"] and all(report["is_cached"] for report in reports.values())
        rows.append(_row(scheme, made["artifact"], reports, is_cached))
        differences += [difference(scheme, suite, first[suite], report) for suite, report in reports.items() if first]
        first = first or reports
    reply = smelt("run", "ore-11m:q8_0", PROMPT)
    out = Console(highlight=False, width=TABLE_WIDTH)
    out.print(f"\n{PROMPT}\n", style="italic")
    out.print(reply["text"].strip(), markup=False)
    table = Table(
        "bundle",
        "stored",
        "digest",
        *[f"{suite} pass@1 [95 %]" for suite in suites],
        "tokens/s",
        "this run",
        title="ore-11m",
    )
    for row in rows:
        table.add_row(*row)
    out.print()
    out.print(table)
    out.print(f"problem by problem against {SCHEMES[0]}:", *differences, sep="\n  ", markup=False)
    if problem:
        out.print(f"HumanEval was not scored: {problem}", markup=False)
    trace_id = os.environ["TRACEPARENT"].split("-")[1]
    out.print(f"\n{_trace_summary(smelt('jobs', 'trace', trace_id)['spans'])}", markup=False)
    out.print("seconds are sums over calls that ran side by side; without --json the last command draws the tree")
    out.print(
        f"\ntook {time.monotonic() - started:.0f} s; the platform is still up: `.venv/bin/smelt chat ore-11m:q8_0`"
    )
    out.print("talks to the model, `make down` stops it", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
