"""Perplexity: which tokens count, what their log-probabilities give, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smelt.evaluator.v1 import evaluator_pb2

from services.evaluator.perplexity import (
    Window,
    check_sane,
    check_tokens,
    measure,
    perplexity_of,
    windows_of,
)
from services.evaluator.perplexity_job import PerplexityTask
from services.evaluator.perplexity_report import WINDOWS_FILE, open_result, store_perplexity
from services.evaluator.texts import load_text, texts
from smeltkit import limits
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import (
    AbsurdPerplexity,
    BadManifest,
    BadSuite,
    PromptTooLong,
    ReportMismatch,
    TooFewTokens,
    UnsupportedOption,
)
from smeltkit.ids import digest_bytes
from smeltkit.manifest import BUNDLE_TYPE, Manifest

TEXT = texts()["wikitext2"]
WINDOWS = [Window(begin=512 * index, tokens=512, nats=512 * math.log(20 + index % 2)) for index in range(200)]
sizes = st.tuples(st.integers(0, 5000), st.integers(2, 300)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
)


@given(sizes)
def test_each_token_but_the_first_counts_once_and_with_the_context_that_the_stride_leaves(
    size: tuple[int, int, int],
) -> None:
    """R-097: what window and stride mean."""
    count, window, stride = size
    counted: list[int] = []
    for number, (begin, end, tokens) in enumerate(windows_of(count, window, stride)):
        assert 0 < end - begin <= window and 0 < tokens <= end - begin
        assert number == 0 or end - tokens - begin >= window - stride
        counted += range(end - tokens, end)
    assert counted == list(range(1, count))


async def _measured(score: Any, ids: Sequence[int], window: int = 8, stride: int = 4) -> list[Window]:
    async def progress(done: int, total: int) -> None:
        assert done <= total

    return await measure(score, ids, window=window, stride=stride, concurrency=3, progress=progress)


async def test_a_model_that_guesses_among_50_has_perplexity_50() -> None:
    async def score(ids: Sequence[int]) -> list[float]:
        return [0.0, *(-math.log(50) for _ in ids[1:])]

    found = perplexity_of(await _measured(score, range(1001)), 2000)
    assert found.tokens == 1000
    assert found.token.value == found.token.low == found.token.high == pytest.approx(50)
    assert found.byte.value == pytest.approx(math.sqrt(50))


async def test_windows_come_in_order_however_they_end() -> None:
    async def score(ids: Sequence[int]) -> list[float]:
        await asyncio.sleep(0.001 * (ids[0] % 3))
        return [-float(token) for token in ids]

    windows = await _measured(score, range(100))
    assert [window.begin for window in windows] == sorted(window.begin for window in windows)
    assert sum(window.nats for window in windows) == sum(range(1, 100))


@pytest.mark.parametrize(
    "reply", [[0.0] * 7, [0.0] * 7 + [math.nan], [0.0] * 7 + [-math.inf]], ids=["short", "nan", "inf"]
)
async def test_a_log_probability_that_is_none_is_an_error(reply: list[float]) -> None:
    """R-097: it is not left out of the sum."""

    async def score(ids: Sequence[int]) -> list[float]:
        return reply

    with pytest.raises(ReportMismatch, match="tokens 0 to 8"):
        await _measured(score, range(30))


def test_the_interval_is_that_of_windows_and_shrinks_with_their_number() -> None:
    few, many = perplexity_of(WINDOWS[:20], 20_000), perplexity_of(WINDOWS, 200_000)
    assert few.token.low < few.token.value < few.token.high
    assert many.token.high - many.token.low < few.token.high - few.token.low
    together = [
        replace(one, tokens=1024, nats=one.nats + two.nats)
        for one, two in zip(WINDOWS[::2], WINDOWS[1::2], strict=True)
    ]
    assert perplexity_of(together, 200_000).token.value == pytest.approx(many.token.value)
    with pytest.raises(ReportMismatch, match="no perplexity"):
        perplexity_of([], 10)


def test_fewer_than_100_000_tokens_are_refused() -> None:
    """R-097: 164 tokens once passed for a measurement."""
    check_tokens(100_000)
    with pytest.raises(TooFewTokens, match="99999 tokens, a perplexity needs 100000"):
        check_tokens(99_999)


def test_a_perplexity_above_half_the_vocabulary_is_an_error() -> None:
    """R-097: that of a model whose weights were ignored."""
    found = perplexity_of([replace(window, nats=window.tokens * math.log(4096)) for window in WINDOWS], 1)
    check_sane(found, 8200)
    with pytest.raises(AbsurdPerplexity, match="half the vocabulary of 8000"):
        check_sane(found, 8000)
    endless = perplexity_of([replace(window, nats=1e9) for window in WINDOWS], 1)
    with pytest.raises(AbsurdPerplexity):
        check_sane(endless, 8000)


def _manifest(context_tokens: int = 2048, **config: Any) -> Manifest:
    contract = {"context_tokens": context_tokens, "thinking": None}
    known = {"scheme": "BF16", "contract": contract, "architecture": {"vocab_size": 8192}}
    return Manifest(artifact_type=BUNDLE_TYPE, config={**known, **config})


@pytest.mark.parametrize(
    "field", [{"samples": 2}, {"temperature": 0.5}, {"limit": 9}, {"max_tokens": 9}, {"seed": 1}], ids=str
)
def test_a_setting_of_sampling_has_no_effect_and_is_refused(field: dict[str, Any]) -> None:
    spec = evaluator_pb2.EvaluationSpec(samples=1, top_p=1)
    assert PerplexityTask.checked(spec, TEXT, _manifest(), 4).vocab_size == 8192
    with pytest.raises(UnsupportedOption, match=f"{next(iter(field))} has no effect"):
        PerplexityTask.checked(evaluator_pb2.EvaluationSpec(**field), TEXT, _manifest(), 4)


def test_a_bundle_that_cannot_be_measured_is_refused_before_anything_is_loaded() -> None:
    spec = evaluator_pb2.EvaluationSpec()
    (refusal,) = PerplexityTask.checked(spec, TEXT, _manifest(512), 4).plan("store").refusals
    assert isinstance(refusal, PromptTooLong)
    with pytest.raises(BadManifest, match="vocabulary"):
        PerplexityTask.checked(spec, TEXT, _manifest(architecture={}), 4)


def _stored(store: LocalStore) -> str:
    provenance = {"bundle": digest_bytes(b"b"), "suite": TEXT.digest, "data": TEXT.data.digest, "trace": ""}
    times = {"generate_s": 1.0, "total_s": 2.0}
    return store_perplexity(store, TEXT, WINDOWS, 200_000, engine={}, provenance=provenance, times=times)


def test_a_report_states_window_stride_and_tokens(tmp_path: Path) -> None:
    """R-097."""
    report = open_result(LocalStore(tmp_path), _stored(LocalStore(tmp_path)))
    assert report.config["text"] == {
        "tokens": 102_400,
        "bytes": 200_000,
        "window_tokens": 1024,
        "stride_tokens": 512,
    }
    assert [score.metric for score in report.scores] == ["token_perplexity", "byte_perplexity"]
    assert report.scores[0].low < report.scores[0].value < report.scores[0].high
    assert report.scores[0].value == pytest.approx(math.sqrt(20 * 21))
    assert report.has_current_suite


def test_a_report_that_says_another_perplexity_than_its_windows_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = store.get_manifest(_stored(store))
    (token, byte) = manifest.config["scores"]
    boast = {**manifest.config, "scores": [{**token, "value": 1.5}, byte]}
    with pytest.raises(ReportMismatch, match="another perplexity"):
        open_result(store, store.put_manifest(replace(manifest, config=boast)))
    layers = tuple(layer for layer in manifest.layers if layer.path != WINDOWS_FILE)
    with pytest.raises(ReportMismatch, match="no windows"):
        open_result(store, store.put_manifest(replace(manifest, layers=layers)))


def test_the_shipped_text_is_wikitext2_with_its_window_and_stride() -> None:
    assert (TEXT.window_tokens, TEXT.stride_tokens, TEXT.size_bytes) == (1024, 512, 1_290_547)
    assert TEXT.size_bytes / 4 > limits.PERPLEXITY_TOKENS_MIN


@pytest.mark.parametrize(
    "change", [("stride_tokens: 512", "stride_tokens: 2048"), ("version: 1", "version: 1\nshots: 5")]
)
def test_a_malformed_text_is_refused_by_file_and_field(change: tuple[str, str], tmp_path: Path) -> None:
    """R-014."""
    shipped = Path(load_text.__code__.co_filename).parent / "wikitext2.yaml"
    path = tmp_path / "wikitext2.yaml"
    path.write_text(shipped.read_text().replace(*change))
    with pytest.raises(BadSuite, match="wikitext2.yaml"):
        load_text(path)
