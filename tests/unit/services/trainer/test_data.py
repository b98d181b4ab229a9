"""The data path: what is learnt, what is packed with what, and in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.trainer.data.dataset import read_dataset
from services.trainer.data.order import Order
from services.trainer.data.samples import Encoder
from smeltkit.errors import BadDataset, BadSchedule
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.model_files import template_of
from smeltkit.testing.tiny_models import write_tiny_model

ORE = Path(__file__).parents[4] / "examples" / "models" / "ore-11m"
LINEAGE = Lineage(operation="import", code_revision="test")
ROW = {
    "messages": [
        {"role": "user", "content": "Add a and b."},
        {"role": "assistant", "content": "```python\ndef add(a, b):\n\treturn a + b\n```"},
    ]
}
LONGER = {"messages": [*ROW["messages"], {"role": "user", "content": "More."}, {"role": "assistant", "content": "No."}]}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(ORE, Bundle.from_folder(ORE, lineage=LINEAGE, licence="Apache-2.0").contract)


def _learnt(encoder: Encoder, row: dict[str, Any]) -> list[str]:
    """What is learnt of a row, as text, one entry a run of targets."""
    sample, runs = encoder.encode(row, "row 1"), [[]]  # type: Any
    for target in sample.targets.tolist():
        if target == IGNORED:
            runs.append([])
        else:
            runs[-1].append(target)
    return [encoder.tokenizer.decode(run) for run in runs if run]


def test_what_is_learnt_is_the_answer_and_its_stop_token(encoder: Encoder) -> None:
    """R-062: decoded, for one turn and for each of several."""
    answer = ROW["messages"][1]["content"] + "<|im_end|>"
    assert _learnt(encoder, ROW) == [answer]
    assert _learnt(encoder, LONGER) == [answer, "No.<|im_end|>"]
    assert encoder.preview(encoder.encode(ROW, "row 1")).endswith(f"<<{answer}>>")


def test_ids_of_a_conversation_are_those_of_serving(encoder: Encoder) -> None:
    """The prompt part of a sample is what the server encodes when it asks for that answer."""
    sample = encoder.encode(LONGER, "row 1")
    whole = encoder.tokenizer.decode(sample.ids.tolist())
    assert whole.count("<|im_start|>") == 4 and whole.endswith("No.<|im_end|>")


def test_every_token_of_a_text_is_learnt_and_its_end_too(encoder: Encoder) -> None:
    """Plain documents teach where they end."""
    sample = encoder.encode({"text": "def f(x):\n    return x\n"}, "row 1")
    assert (sample.targets[:-1] == sample.ids[1:]).all() and sample.targets[-1] == IGNORED


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x"}, "has the keys prompt; exactly one of messages, text, ids is needed, or columns"),
        ({**ROW, "text": "x"}, "has the keys messages, text; exactly one"),
        ({"text": 5}, "text is 5, it must be text"),
        ({"text": float("nan"), "id": 1}, "text is nan, it must be text"),
        ({"messages": "x"}, "messages is 'x', it must be a list of messages"),
        ({"messages": []}, "holds no message"),
        ({"messages": [*ROW["messages"], {"role": "user"}]}, "message 3 is {'role': 'user'}; it needs a role and a"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        (
            {"messages": [{"role": "usr", "content": "x"}, *ROW["messages"]]},
            "the role 'usr'; roles are system, user, assistant, tool; did you mean 'user'",
        ),
        ({"messages": [*ROW["messages"][:1], {"role": "assistant", "content": ""}]}, "row 7: the answer is empty"),
        (
            {"messages": [*ROW["messages"][:1], {"role": "assistant", "content": "a<|im_end|>b"}]},
            "what would be learnt",
        ),
        ({"text": ""}, "no token to learn"),
    ],
)
def test_rows_that_teach_nothing_or_something_else_are_refused(encoder: Encoder, row: Any, says: str) -> None:
    """R-062: by name of the row, never by skipping it."""
    with pytest.raises(BadDataset, match=says) as caught:
        encoder.encode(row, "data.jsonl row 7")
    assert "row 7" in caught.value.message


def test_long_conversations_are_counted_and_long_texts_are_cut(tmp_path: Path, encoder: Encoder) -> None:
    """R-055: one policy, and no token is lost or learnt twice where a text is cut."""
    path = tmp_path / "data.jsonl"
    text = "value = 1 + 2\n" * 40
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, LONGER, {"text": text})))
    short = len(encoder.encode(ROW, "").ids)
    found = read_dataset(path, encoder, short)
    assert found.rows == 3 and found.too_long == (2,)
    assert max(len(sample.ids) for sample in found.samples) <= short
    learnt = [t for sample in found.samples[1:] for t in sample.targets.tolist() if t != IGNORED]
    assert learnt == encoder.encode({"text": text}, "").ids[1:].tolist()


def test_what_stands_beside_a_row_is_not_read(tmp_path: Path, encoder: Encoder) -> None:
    """As in Parquet, whatever the row holds."""
    rows: list[dict[str, Any]] = [ROW, {"text": "a b c d"}]
    plain, more = tmp_path / "plain.jsonl", tmp_path / "more.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more.write_text("".join(json.dumps({"id": 5, **row, "tags": ["x"]}) + "\n" for row in rows))
    found = [[sample.ids.tolist() for sample in read_dataset(path, encoder, 128).samples] for path in (plain, more)]
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("data", [b"", b" \n\n"])
def test_a_file_without_rows_is_refused_as_such(tmp_path: Path, encoder: Encoder, data: bytes) -> None:
    """Rather than for what its rows are."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadDataset, match=r"^data.jsonl holds no row$"):
        read_dataset(path, encoder, 64)


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}\n{"text": 3}'])
def test_broken_rows_are_named(tmp_path: Path, encoder: Encoder, line: str) -> None:
    """A crafted or truncated file gives a typed error."""
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadDataset, match=r"data.jsonl row [12]"):
        read_dataset(path, encoder, 64)


def test_a_role_that_only_the_template_knows_is_taken(tmp_path: Path) -> None:
    """Beside the usual ones, and told where another is refused."""
    write_tiny_model(tmp_path, "qwen2")
    contract = Bundle.from_folder(tmp_path, lineage=LINEAGE).contract
    more = "{% if messages[0]['role'] == 'developer' or messages[0].role == \"critic\" %}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text((template_of(ORE) or "") + more)
    encoder = Encoder(tmp_path, contract)
    assert encoder.encode({"messages": [{"role": "developer", "content": "x"}, *ROW["messages"]]}, "row 1").counted
    with pytest.raises(BadDataset, match="assistant, tool, developer, critic$"):
        encoder.encode({"messages": [{"role": "", "content": "x"}, *ROW["messages"]]}, "row 1")


def test_template_without_a_stop_token_is_refused(tmp_path: Path) -> None:
    """R-062: an answer that nothing ends would never be ended when serving."""
    write_tiny_model(tmp_path, "qwen2")
    contract = Bundle.from_folder(tmp_path, lineage=LINEAGE).contract
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(BadDataset, match="none of the stop tokens"):
        Encoder(tmp_path, contract).encode(ROW, "row 1")


def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    """R-057: the order follows from the seed alone, so a later step is found without the earlier ones."""
    lengths = tuple(1 + index * 7 % 30 for index in range(200))
    order = Order(lengths=lengths, pack_tokens=64, packs_per_step=3, seed=5)
    epochs = [[number for pack in order.packs(epoch) for number in pack] for epoch in range(2)]
    assert all(sorted(numbers) == list(range(200)) for numbers in epochs) and epochs[0] != epochs[1]
    assert all(sum(lengths[number] for number in pack) <= 64 for pack in order.packs(0))
    again = Order(lengths=lengths, pack_tokens=64, packs_per_step=3, seed=5)
    steps = [order.at(step) for step in range(order.steps_in(2))]
    assert [number for step in steps for pack in step for number in pack] == epochs[0] + epochs[1]
    assert again.at(order.steps(0) + 2) == steps[order.steps(0) + 2]
    assert order.efficiency > 0.8
    with pytest.raises(BadSchedule):
        Order(lengths=(65,), pack_tokens=64, packs_per_step=3, seed=5)
