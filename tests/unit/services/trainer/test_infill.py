"""Rows rearranged for filling in the middle, and what reading data takes of memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from services.trainer.data.dataset import read_dataset
from services.trainer.data.infill import MARKERS, Infill
from services.trainer.data.samples import Encoder
from services.trainer.plan import plan_of, prepare
from services.trainer.settings.training import FimSettings, parse_settings
from smeltkit.errors import BadConfig, BadDataset, UnsupportedOption
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.testing.tiny_models import write_tokenizer

EXAMPLE = Path(__file__).parents[4] / "examples/models/ore-11m"
TEXT = "def add(a, b):\n    return a + b\n\n\n# \u00e4\u00f6\u00fc \U0001f642\n"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    bundle = Bundle.from_folder(EXAMPLE, lineage=Lineage(operation="import", code_revision="test"))
    return Encoder(EXAMPLE, bundle.contract)


def test_a_rearranged_row_is_the_text_in_three_parts_behind_single_tokens(encoder: Encoder) -> None:
    """R-078: each marker is one id, each once; put back in order the parts are the text, byte for byte."""
    words = encoder.tokenizer
    prefix, suffix, middle = (words.token_id(marker) for marker in MARKERS[0])
    infill = Infill(words, FimSettings(share=1.0), 0)
    orders = set()
    for number in range(60):
        ids = infill.ids(TEXT, number, "row")
        assert ids is not None and ids == infill.ids(TEXT, number, "row")
        assert [ids.count(marker) for marker in (prefix, suffix, middle)] == [1, 1, 1] and ids[0] == prefix
        after, rest = ids[ids.index(suffix) + 1 : ids.index(middle)], ids[ids.index(middle) + 1 :]
        before = ids[1 : ids.index(suffix)]
        assert words.decode(before) + words.decode(rest) + words.decode(after) == TEXT
        orders.add(bool(before))
    assert orders == {True, False}


def test_the_share_of_rows_and_their_draw_hang_on_seed_and_number_alone(tmp_path: Path, encoder: Encoder) -> None:
    """A row is rearranged or not whatever stands before it; conversations and rows that would not fit never are."""
    lines = [json.dumps({"text": f"{TEXT}{number}"}) for number in range(400)]
    infill = Infill(encoder.tokenizer, FimSettings(share=0.25), 5)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = read_dataset(tmp_path / "rows.jsonl", encoder, 128, infill=infill)
    assert 70 < found.rearranged < 130 and found.rows == 400
    first = encoder.tokenizer.token_id(MARKERS[0][0])
    moved = [number for number, sample in enumerate(found.samples) if first in sample.ids]
    assert len(moved) == found.rearranged
    assert moved == [number for number in range(400) if infill.ids("x", number + 1, "") is not None]
    longest = max(len(encoder.encode({"text": json.loads(line)["text"]}, "").ids) for line in lines)
    tight = read_dataset(
        tmp_path / "rows.jsonl", encoder, longest, infill=Infill(encoder.tokenizer, FimSettings(share=1.0), 0)
    )
    assert tight.rearranged < 400 and max(tight.samples.lengths) <= longest
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    with pytest.raises(UnsupportedOption, match="holds no text"):
        read_dataset(tmp_path / "chat.jsonl", encoder, 128, infill=infill)


def test_markers_that_are_no_single_tokens_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    """R-078: none at all, one missing of three, and one inside of a text."""
    write_tokenizer(tmp_path)
    with pytest.raises(BadConfig, match="this one has none"):
        Infill(Tokenizer.from_file(tmp_path / "tokenizer.json"), FimSettings(share=0.5), 0)
    stored = json.loads((EXAMPLE / "tokenizer.json").read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != MARKERS[0][2]]
    with pytest.raises(BadConfig, match=r"spells <\|fim_middle\|> in \d+; set fim.share to 0"):
        Infill(Tokenizer(json.dumps(stored).encode()), FimSettings(share=0.5), 0)
    with pytest.raises(BadDataset, match=r"row 7 holds the marker <\|fim_suffix\|>"):
        Infill(encoder.tokenizer, FimSettings(share=1.0), 0).ids("a <|fim_suffix|> b", 7, "row 7")


@pytest.mark.parametrize(
    ("fim", "said"),
    [('{"share": 1.5}', "fim.share=1.5 must be 0 to 1"), ('{"suffix_first": 0.1}', "no effect with fim.share=0"),
     ('{"spm": 1}', "fim.spm is no setting")],
)  # fmt: skip
def test_settings_of_filling_in_are_strict(fim: str, said: str) -> None:
    with pytest.raises((BadConfig, UnsupportedOption), match=said):
        parse_settings(f'{{"fim": {fim}}}')


def test_reading_takes_no_memory_that_grows_with_the_data(tmp_path: Path, encoder: Encoder) -> None:
    """R-080: four times the rows, and at most 16 bytes more in memory for each further one."""
    row = json.dumps({"text": "x = 1"}) + " " * 8000 + "\n"
    peaks = []
    for rows in (300, 300, 1200):  # the first fills caches
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(row * rows)
        tracemalloc.start()
        found = read_dataset(path, encoder, 1024)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.rows == len(found.samples) == rows
    assert peaks[2] - peaks[1] < 16 * 900


def test_a_plan_tells_how_many_rows_are_rearranged(tmp_path: Path) -> None:
    """By the same settings as the training itself; held-out rows stay as they are."""
    for name in ("data", "heldout"):
        rows = (json.dumps({"text": f"{TEXT}{number}"}) + "\n" for number in range(40))
        (tmp_path / name).write_text("".join(rows))
    bundle = Bundle.from_folder(EXAMPLE, lineage=Lineage(operation="import", code_revision="test"))
    settings = parse_settings('{"method": "pretrain", "fim": {"share": "0.5"}, "sequence_tokens": 128}')
    prepared = prepare(EXAMPLE, bundle, [tmp_path / "data"], tmp_path / "heldout", settings)
    assert prepared.heldout is not None and prepared.heldout.rearranged == 0
    assert 10 <= prepared.data[0].rearranged <= 30
    said = plan_of(prepared, 0).items["rearranged"]
    assert said == f"{prepared.data[0].rearranged} rows, to fill in the middle"
