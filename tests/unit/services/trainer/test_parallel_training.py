"""Layers and packs that processes share: the numbers of one process, whole checkpoints, what cannot be split."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import torch
from training_files import prepared_from

from benchmarks.gpu.contenders import RANK
from benchmarks.gpu.scale import CASES
from benchmarks.gpu.shapes import SHAPES, TOKENS
from services.trainer.costs.memory import checkpoint_bytes, components, trainable_parameters
from services.trainer.parallel import devices
from services.trainer.parallel.splits import refusals
from services.trainer.plan import plan_of
from services.trainer.settings.parallel import ParallelSettings
from services.trainer.settings.training import LoraSettings, TrainSettings, parse_settings
from smeltkit.errors import BadConfig, UnsupportedOption
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder_packing import Packed, Piece, attend_from, packed_attention
from smeltkit.testing.tiny_models import tiny_config

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"
Start = Callable[..., list[Future[list[Any]]]]
"""Arrangement, function and its arguments to what each of the processes will return."""
PRELOADED = ["pytest", "numpy.random", "services.trainer.run.loop", "services.trainer.adapters.lora", "torch._dynamo",
             "services.trainer.parallel.tensor", "smeltkit.testing.tiny_models", "torch.distributed.fsdp"]  # fmt: skip
"""What takes long to load, some of it only when it is first asked for, and is loaded once for all processes."""
TENSOR, CONTEXT = {"tensor": 2}, {"context": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs functions of `parallel_runs` in processes that share the work of one; four of them, made once."""
    context, folder, numbers = get_context("forkserver"), tmp_path_factory.mktemp("met"), itertools.count()
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(max_workers=4, mp_context=context) as pool:

        def run(layout: dict[str, int], function: Callable[..., list[Any]], *given: Any) -> list[Future[list[Any]]]:
            count = torch.tensor(list(layout.values())).prod().item()
            place = folder / str(next(numbers))
            return [pool.submit(function, layout, rank, place, *given) for rank in range(int(count))]

        yield run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What one process trains, by method."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        method: parallel_runs.train({}, 0, folder, method, folder / method, parallel_runs.STEPS)
        for method in ("full", "lora")
    }


def test_two_processes_that_share_layers_or_packs_train_as_one_does(
    start: Start, alone: dict[str, list[Any]], tmp_path: Path
) -> None:
    """R-067: losses, gradient norms and weights within float32's rounding. One process begins, two go on from its
    checkpoint, and one from theirs."""
    folders = {"tensor": tmp_path / "tensor", "context": tmp_path / "context"}
    first = [parallel_runs.train({}, 0, tmp_path, "full", folder, 1)[:-1] for folder in folders.values()]
    jobs = [start({name: 2}, parallel_runs.train, "full", folder, 3) for name, folder in folders.items()]
    for begun, folder, (one, other) in zip(first, folders.values(), jobs, strict=True):
        middle = one.result()[:-1]
        assert middle == other.result()[:-1], "all of them tell the same"
        last = parallel_runs.train({}, 0, tmp_path, "full", folder, parallel_runs.STEPS)
        check_same([*begun, *middle, *last], alone["full"])


def test_two_processes_train_adapters_as_one_does(start: Start, alone: dict[str, list[Any]], tmp_path: Path) -> None:
    """R-067: of an adapter one side is split as its layer is, the other is whole."""
    jobs = [
        start(layout, parallel_runs.train, "lora", tmp_path / str(number), parallel_runs.STEPS)
        for number, layout in enumerate((TENSOR, CONTEXT))
    ]
    for job in itertools.chain.from_iterable(jobs):
        check_same(job.result(), alone["lora"])


def test_four_processes_share_layers_and_spread_what_each_holds(
    start: Start, alone: dict[str, list[Any]], tmp_path: Path
) -> None:
    """Two by two: FSDP2 over the parts of layers, each pair with packs of its own."""
    for job in start({"data": 2, "tensor": 2}, parallel_runs.train, "full", tmp_path, parallel_runs.STEPS):
        check_same(job.result(), alone["full"])


@pytest.mark.parametrize(
    ("model", "layout"),
    [("biases everywhere", TENSOR), ("norms of heads, tied head", {"context": 2, "tensor": 2})],
)
def test_every_kind_of_parameter_is_split_as_it_computes(
    start: Start, model: str, layout: dict[str, int], tmp_path: Path
) -> None:
    """Biases that are added once, norms of heads, a head that is the embedding; activations are computed again."""
    expected = parallel_runs.step({}, 0, tmp_path, model)
    for job in start(layout, parallel_runs.step, model):
        assert job.result() == [pytest.approx(numbers, rel=1e-5) for numbers in expected]


def check_same(found: list[Any], expected: list[Any]) -> None:
    """Steps, then weights."""
    assert found[:-1] == [pytest.approx(numbers, rel=1e-5) for numbers in expected[:-1]]
    assert found[-1].keys() == expected[-1].keys()
    for name, value in expected[-1].items():
        torch.testing.assert_close(
            found[-1][name], value, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("lengths", [(24,), (5, 19), (1, 1, 9, 2, 11), (12, 12)])
def test_pieces_attend_as_their_pack_does(lengths: tuple[int, ...]) -> None:
    """Causal from where a piece begins in its sample, never into another; wherever it is cut."""
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, 8) for heads in (4, 2, 2))
    whole = packed_attention(q, k, v, Packed.of([[0] * length for length in lengths]))
    for size in (1, 3, 4, total):
        pieces = [Piece.of(begin, begin + size, lengths) for begin in range(0, total, size)]
        found = [attend_from(q[piece.begin : piece.end], k, v, piece) for piece in pieces]
        torch.testing.assert_close(torch.cat(found), whole)


def settings_of(**given: Any) -> TrainSettings:
    """Settings of four processes that share four packs a step."""
    return TrainSettings(**{"method": "full", "processes": 4, "packs_per_step": 4, **given})


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("qwen3", {}, "parallel.tensor=2 does not divide kv_heads=3; it may be 1"),
        ("llama", {"intermediate_size": 417}, "parallel.tensor=2 does not divide intermediate_size=417; it may be 1"),
        ("phi3", {}, "parallel.tensor=2 cannot split the fused projections of phi3; set it to 1"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(architecture: str, overrides: dict[str, Any], message: str) -> None:
    """Before the start, with the dimension, its size and what would do; one that can be is not."""
    config = ModelConfig.from_hf(tiny_config(architecture, **overrides))
    found = refusals(config, settings_of(parallel=ParallelSettings(tensor=2)))
    assert [error.message[: len(message)] for error in found] == [message]
    assert not refusals(config, settings_of())
    assert not refusals(ModelConfig.from_hf(tiny_config("qwen2")), settings_of(parallel=ParallelSettings(tensor=2)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"parallel": {"tensor": 3}}, BadConfig, "processes=4 cannot be arranged by parallel.tensor=3"),
        ({"processes": 1, "parallel": {"context": 2}}, BadConfig, "make it a multiple of 2"),
        ({"parallel": {"tenser": 2}}, BadConfig, "did you mean parallel.tensor"),
        ({"parallel": {"tensor": 0}}, BadConfig, "parallel.tensor=0 must be 1 to 64"),
        ({"parallel": {"tensor": 4}, "regather": False}, UnsupportedOption, "regather has no effect"),
        ({"parallel": {"tensor": 2}, "packs_per_step": 3}, BadConfig, "make it 4"),
        ({"parallel": {"context": 4}, "sequence_tokens": 8, "pack_tokens": 8}, None, ""),
        ({"processes": 16, "parallel": {"context": 16}, "sequence_tokens": 8}, BadConfig, "lower it to 4"),
        ({"method": "qlora", "parallel": {"tensor": 2}}, UnsupportedOption, "use parallel.context"),
        ({"method": "lora", "lora": {"dora": True}, "parallel": {"tensor": 2}}, UnsupportedOption, "without dora"),
        ({"method": "qlora", "parallel": {"context": 2}}, None, ""),
    ],
)
def test_an_arrangement_without_effect_or_that_does_not_fit_is_refused(
    given: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    """With what would do."""
    text = json.dumps({"method": "full", "processes": 4, "packs_per_step": 4, **given})
    if error is None:
        parse_settings(text)
        return
    with pytest.raises(error, match=message):
        parse_settings(text)


def test_the_plan_tells_the_arrangement_and_the_memory_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-068: matrices of shared layers are halved, tokens of shared packs too, keys and values are gathered; a
    checkpoint is whole. A plan that is refused is told all the same."""
    config = ModelConfig.from_hf(tiny_config("qwen2"))
    one, tensor, context = (
        components(config, settings_of(processes=count, parallel=ParallelSettings(**parallel)))
        for count, parallel in ((1, {}), (2, {"tensor": 2}), (2, {"context": 2}))
    )
    vectors = 4 * sum(spec.elements for spec in config.tensors() if "norm" in spec.name)
    assert tensor["weights"] == (one["weights"] - vectors) // 2 + vectors
    assert one["activations"] // 2 < tensor["activations"] < one["activations"]
    kept = 2 * config.layers * config.dimensions()["kv"] * 1024 * 4
    assert context["activations"] == one["activations"] // 2 + kept
    assert context["weights"] == one["weights"] // 2
    adapted = settings_of(method="lora", processes=2, parallel=ParallelSettings(tensor=2), lora=LoraSettings(rank=4))
    assert checkpoint_bytes(config, adapted) == 3 * 4 * trainable_parameters(config, adapted)
    monkeypatch.setattr(devices, "devices_here", lambda: (8, "GPUs"))
    plan = plan_of(prepared_from(tmp_path, processes=4, parallel={"tensor": 2, "context": 2}), 1000)
    assert plan.items["processes"].startswith("4, 1 for packs x 2 for the tokens of each x 2 for layers; memory is")
    refused = plan_of(prepared_from(tmp_path, processes=4, parallel={"tensor": 4}), 1000)
    assert "parallel.tensor=4 does not divide heads=6; it may be 1, 2" in [e.message for e in refused.refusals]


@pytest.mark.parametrize("name", ["train_parallel_gpus", "train_two_gpus_lora"])
def test_the_planned_memory_of_shared_layers_is_what_two_gpus_were_seen_to_take(name: str) -> None:
    """R-068: within 3 % of every measured peak."""
    rows = [row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"] if row["layout"] == "tensor"]
    assert rows
    for row in rows:
        facts = CASES[row["case"]]
        tokens, is_adapted = facts.get("tokens", TOKENS), facts["method"] == "lora"
        settings = TrainSettings(
            method=facts["method"], dtype="bfloat16", sequence_tokens=tokens, pack_tokens=facts["sequences"] * tokens,
            lora=LoraSettings(rank=RANK) if is_adapted else LoraSettings(), processes=2, packs_per_step=1,
            parallel=ParallelSettings(tensor=2),
        )  # fmt: skip
        planned = sum(components(ModelConfig.from_hf(SHAPES[facts["shape"]]), settings).values())
        assert planned / 2**30 == pytest.approx(row["peak_gib"], rel=0.03), row["case"]
