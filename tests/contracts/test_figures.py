"""What documents state of speed, memory and shares stands in a stored measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.refine_seeds import training_digest
from contracts.figures import ROOT, documents_of, figures_in, unfounded

RESULTS = ROOT / "benchmarks" / "results"
STORED = {
    "share": 0.8264,
    "rows": [
        {"case": "a", "contender": "ours", "step_ms": 50.0, "peak_gib": 28.44, "losses": [float(n) for n in range(99)]},
        {"case": "a", "contender": "peer", "step_ms": 75.2, "peak_gib": 40.0},
    ],
}


def test_every_figure_of_the_documents_is_in_a_result_that_they_name() -> None:
    """R-113: the README and all of docs."""
    documents = documents_of(ROOT)
    assert sum(len(figures_in(text)) for text in documents.values()) > 100
    assert [str(one) for one in unfounded(documents, RESULTS)] == []


def test_the_gain_that_the_readme_shows_is_of_several_seeds() -> None:
    """R-069: of the training as it is shipped now, and told where the gain is."""
    told = json.loads((RESULTS / "refine_seeds.json").read_text())
    assert told["training"] == training_digest()
    assert len({row["seed"] for row in told["rows"]}) == len(told["rows"]) >= 2
    section = (ROOT / "README.md").read_text().partition("make demo-refine` shows")[2].partition("\n## ")[0]
    assert "refine_seeds.json" in section


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`speed.json`: 1.50 x as fast, 50.0 ms instead of 75.2 ms, in 28.4 GiB, 82.6 % of it, 17 % saved", []),
        ("`speed.json`: 1.51 x", ["1.51 x"]),
        ("`speed.json`: 50.1 ms", ["50.1 ms"]),
        ("`speed.json`: 28.5 GiB", ["28.5 GiB"]),
        ("`speed.json`: 41 times", ["41 times"]),
        ("`speed.json`: 97 ms", ["97 ms"]),
        ("by `python -m benchmarks.speed`: 3 x", ["3 x"]),
        ("`absent.json`: 1.50 x", ["absent.json is not stored", "1.50 x"]),
        ("`absent.json` and `speed.json`: 1.50 x", ["absent.json is not stored"]),
        ("by `python -m benchmarks.gpu.gone`", ["benchmarks.gone does not exist"]),
        ("`tokenizer.json` is no result", []),
        ("1.50 x as fast. 30 ms and 20 % are settings", ["1.50 x"]),
        ("`speed.json`: [95 %], within 2 %\n```\n3 x\n```", []),
        ("`speed.json`\n## Next\n1.50 x", ["1.50 x"]),
    ],
)
def test_a_figure_that_nothing_bears_out_is_named(text: str, wrong: list[str], tmp_path: Path) -> None:
    """R-113: another number, another unit, no result, a result of another section, a raw series, what is not there."""
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "speed.py").touch()
    (results / "speed.json").write_text(json.dumps(STORED))
    assert [one.figure for one in unfounded({"a.md": text}, results)] == wrong
