"""The shipped model, refined: planned, fine-tuned by LoRA, merged, quantized, and compared with its start in pairs.

Runs the same `smelt` commands a person would type. A second run finds every stage in the store and takes seconds.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from typing import Any

from scripts.demo import BASIC, MODEL, ROOT, console, smelt

TRAINING = ROOT / "examples" / "refine" / "ore-11m.yaml"
SCHEME = "Q8_0"


def score(name: str) -> dict[str, Any]:
    """The report of a model on the shipped suite."""
    return smelt("eval", "--suite", "basic", "--data", str(BASIC), name)


def main() -> int:
    """Exit status: 0, or that of the first command that failed."""
    started = time.monotonic()
    os.environ.setdefault("TRACEPARENT", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
    # Operations of so small a model are over before a second thread has begun: on busy cores two are slower than one.
    os.environ.setdefault("SMELT_TRAINER_THREADS", "1")
    smelt("up")
    smelt("import", str(MODEL), "--name", "ore-11m")
    plan = smelt("train", "plan", str(TRAINING))
    for item in plan["items"]:
        console.print(f"  {item['name']:>20}  {item['value'].splitlines()[0]}", markup=False)
    trained = smelt("train", "apply", str(TRAINING))
    names = {"ore-11m": "ore-11m:q8_0", "ore-11m:refined": "ore-11m:refined-q8_0"}
    for source, target in names.items():
        smelt("quantize", source, "--scheme", SCHEME, "--name", target)
    reports = [score(name) for name in names.values()]
    compared = smelt("compare", *[report["digest"] for report in reports])
    change = trained["heldout"]
    console.print(
        f"\nheld-out loss {change['before']:.4f} -> {change['after']:.4f},"
        f" change {change['change']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
    )
    console.print_json(data=compared)
    console.print(f"refined bundle {trained['artifact']['digest']}; `smelt inspect ore-11m:refined` shows its lineage")
    console.print(f"took {time.monotonic() - started:.0f} s; the platform is still up, `make down` stops it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
