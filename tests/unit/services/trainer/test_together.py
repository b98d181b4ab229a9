"""Adapters trained together on one base: each is, to the bit, the one that is trained alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer import together_process, train_process
from services.trainer.adapters.attach import attach
from services.trainer.adapters.carriers import adapters, detach, mount
from services.trainer.adapters.lora import LoraLinear
from services.trainer.costs.forecast import Pace
from services.trainer.costs.paces import Paces
from services.trainer.settings.training import LoraSettings, TrainSettings, parse_settings
from services.trainer.together import Part, check_together
from services.trainer.work import plain
from smeltkit.errors import BadRequest, JobCancelled, UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

SHARED = {"method": "lora", "sequence_tokens": 64, "packs_per_step": 2, "checkpoint_steps": 2}
RUNS: list[dict[str, Any]] = [
    {"epochs": 6, "learning_rate": 0.3, "seed": 1, "lora": {"rank": 4, "dropout": 0.3}, "neftune": {"alpha": 8},
     "early_stop": {"steps": 1, "patience": 1}},
    {"epochs": 2, "learning_rate": 1e-3, "seed": 2, "lora": {"rank": 8, "alpha": 4, "dora": True}},
    {"epochs": 2, "learning_rate": 2e-3, "seed": 3,
     "lora": {"rank": 2, "targets": ["attn.q", "mlp.down"], "adalora": {"initial_rank": 4, "final_steps": 1}}},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measuring of paces, and torch as it was afterwards."""
    monkeypatch.setattr(Paces, "of", lambda self, prepared: Pace(step_s=0.1, step_tokens=100, memory_bytes=1 << 20))
    yield
    torch.use_deterministic_algorithms(False)


def _specs(folder: Path, method: str = "lora") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is common to all runs, and what each has of its own; data of other lengths for each."""
    folder.mkdir(exist_ok=True)
    write_tiny_model(folder / "base", "qwen2", is_chat=False)
    shared = {
        "base": str(folder / "base"), "lineage": Lineage(operation="import", code_revision="test").to_dict(),
        "licence": "Apache-2.0", "threads": 1, "paces": str(folder / "paces"),
    }  # fmt: skip
    runs = []
    for number, settings in enumerate(RUNS):
        lines = [f"{n} times {number + 2} is {n * (number + 2)}." for n in range(8 + 4 * number)]
        rows = [json.dumps({"text": line}) + "\n" for line in lines]
        data = folder / f"{number}.jsonl"
        data.write_text("".join(rows))
        parsed = parse_settings(json.dumps({**SHARED, **settings, "method": method}))
        heldout = str(data) if number == 0 else ""
        runs.append({"name": f"tiny:{number}", "settings": plain(parsed), "data": [str(data)], "heldout": heldout,
                     "run_digest": "sha256:" + str(number) * 64})  # fmt: skip
    return shared, runs


def _result(folder: Path) -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
    """Steps of a run as numbers, and its files of weights byte by byte."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [*(folder / "bundle").glob("*.safetensors"), *(folder / "adapter").iterdir()]
    keys = ("step", "steps", "loss", "grad_norm", "learning_rate", "tokens", "sample_ids", "first_grad_norm", "heldout")
    return [tuple(str(step.get(key)) for key in keys) for step in steps], {f.name: f.read_bytes() for f in files}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_each_of_several_adapters_is_the_one_trained_alone(tmp_path: Path, method: str) -> None:
    """R-067: other data, rank, rate, seed and dropout for each; every loss and every bit of the weights, after a stop.

    The stop is by the signal that ends a job, or all of them pause; whoever takes the job over goes on from all
    checkpoints. One of them ends early, in its best weights.
    """
    shared, runs = _specs(tmp_path / "alone", method)
    runs = runs if method == "lora" else runs[1:]
    expected = []
    for number, run in enumerate(runs):
        folder = tmp_path / "alone" / f"run-{number}"
        folder.mkdir()
        outcome = train_process.train(folder, {**shared, **run})
        expected.append((_result(folder), _told(outcome)))
    folder = tmp_path / "together"
    folder.mkdir()
    spec = {**shared, "runs": runs}
    if method == "lora":
        _stop_after(4, folder, spec)
    else:
        _pause(folder, spec)
    joint = together_process.train(folder, spec)["runs"]
    for number, outcome in enumerate(joint):
        assert (_result(folder / str(number)), _told(outcome)) == expected[number]
    if method == "lora":
        assert (folder / "0" / "heldout.jsonl").read_text() == (tmp_path / "alone/run-0/heldout.jsonl").read_text()
        assert 0 < joint[0]["best"]["step"] < joint[0]["stopped"]["step"]
    assert len({outcome["cost"]["tokens"] for outcome in joint}) == len(runs)


def _told(outcome: dict[str, Any]) -> list[Any]:
    return [outcome.get(key) for key in ("heldout", "stopped", "best")]


def _pause(folder: Path, spec: dict[str, Any]) -> None:
    """Trains until each has done one step."""
    runs = [{**run, "settings": {**run["settings"], "until_step": 1}} for run in spec["runs"]]
    for outcome in together_process.train(folder, {**spec, "runs": runs})["runs"]:
        assert (outcome["paused"], outcome["checkpoints"]) == (1, ["step-00000001"]) and "best" not in outcome


def _stop_after(count: int, folder: Path, spec: dict[str, Any]) -> None:
    """Trains until so many steps of all adapters are done; then the process is told to end."""
    with pytest.MonkeyPatch.context() as patch:
        handlers: list[Any] = []
        patch.setattr(together_process.signal, "signal", lambda number, handler: handlers.append(handler))
        write = train_process.Journal.write
        seen = []

        def counted(self: Any, report: Any, measured: Any) -> Any:
            seen.append(report)
            if len(seen) == count:
                handlers[-1](15, None)
            return write(self, report, measured)

        patch.setattr(train_process.Journal, "write", counted)
        with pytest.raises(JobCancelled, match=f"step {count} of all"):
            together_process.train(folder, spec)


def test_an_adapter_that_fails_leaves_the_others_running(tmp_path: Path) -> None:
    """Its error stands in its place; the others have their bundles, and came to their ends together: the next step is
    of whoever has done the least of its own, so shares never differ by more than a step."""
    shared, runs = _specs(tmp_path / "data")
    del runs[0]["settings"]["early_stop"]
    folder = tmp_path / "together"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        check = together_process.Lane.step

        def poisoned(self: Any) -> Any:
            if self.name == "tiny:1" and self.run.step == 1:
                with torch.no_grad():
                    next(iter(self._turns._layers.values())).b.fill_(float("nan"))
            return check(self)

        patch.setattr(together_process.Lane, "step", poisoned)
        joint = together_process.train(folder, {**shared, "runs": runs})["runs"]
    assert joint[1]["reason"] == "TRAINING_DIVERGED" and "forecast" in joint[1]
    assert all((folder / str(number) / "bundle").is_dir() for number in (0, 2))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    totals = {name: sum(line["name"] == name for line in lines) for name in ("tiny:0", "tiny:2")}
    done = dict.fromkeys(totals, 0)
    for line in lines:
        if line["name"] in done:
            done[line["name"]] += 1
            shares = [done[name] / totals[name] for name in totals]
            assert max(shares) - min(shares) <= 1 / min(totals.values())
    assert totals["tiny:0"] > totals["tiny:2"]


def test_adapters_are_taken_off_and_put_back() -> None:
    """The base computes as before, and a second set of adapters starts from it."""
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_hf(tiny_config("phi3")))
    batch = Packed.of([list(range(20))])
    plain_logits = decoder(batch)
    attach(decoder, LoraSettings(rank=2))
    for _, layer in adapters(decoder, LoraLinear):
        torch.nn.init.normal_(layer.b)
    adapted = decoder(batch)
    taken = detach(decoder)
    assert torch.equal(decoder(batch), plain_logits) and not list(adapters(decoder, LoraLinear))
    attach(decoder, LoraSettings(rank=3))
    assert detach(decoder).keys() == taken.keys()
    mount(decoder, taken)
    assert torch.equal(decoder(batch), adapted) and not torch.equal(adapted, plain_logits)


@pytest.mark.parametrize(
    ("one", "other", "error", "says"),
    [({}, {"dtype": "bfloat16"}, UnsupportedOption, "dtype='bfloat16'"),
     ({}, {"sequence_tokens": 32}, UnsupportedOption, "sequence_tokens=32"),
     ({"method": "full"}, {"method": "full"}, UnsupportedOption, "trains the base itself"),
     ({}, None, BadRequest, "2 to 16")],
)  # fmt: skip
def test_what_cannot_share_a_base_is_refused(
    one: dict[str, Any], other: dict[str, Any] | None, error: type[Exception], says: str
) -> None:
    parts = [
        Part(name=f"tiny:{number}", data=(), settings=TrainSettings(**settings))
        for number, settings in enumerate((one, other))
        if settings is not None
    ]
    with pytest.raises(error, match=says):
        check_together(parts)


def test_results_have_names_of_their_own() -> None:
    parts = [Part(name="tiny:same", data=(), settings=TrainSettings()) for _ in range(2)]
    with pytest.raises(BadRequest, match="names of their own"):
        check_together(parts)
