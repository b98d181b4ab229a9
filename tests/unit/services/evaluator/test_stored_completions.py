"""Stored completions and stored data: read strictly, judged by the same harness."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from suite_files import make_suite

from services.evaluator.data import DataSource, check_digest
from services.evaluator.stored import StoredCompletions, read_completions
from services.evaluator.suites import Suite, find_suite
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import BadFile, BadSuite, DataUnavailable, UnknownBlob
from smeltkit.ids import digest_bytes


def _lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_completions_of_one_problem_are_its_samples_in_order(tmp_path: Path) -> None:
    suite, problems, _ = make_suite(tmp_path)
    rows = [{"task_id": f"Tiny/{index % 2}", "completion": f"{index}"} for index in range(4)]
    found = read_completions(_lines(*rows), problems)
    assert found == {"Tiny/0": ("0", "2"), "Tiny/1": ("1", "3")}
    assert StoredCompletions("sha256:x", found).settings(suite).samples == 2


def test_mbpp_problems_may_be_named_by_number() -> None:
    class _Problem:
        id = "Mbpp/11"

    found = read_completions(_lines({"task_id": 11, "completion": "x"}), [_Problem()])  # type: ignore[list-item]
    assert found == {"Mbpp/11": ("x",)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{\n", "row 1: no valid JSON"),
        (_lines(["Tiny/0", "x"]), "row 1: must be a mapping of fields, not list"),
        (_lines({"task_id": "Tiny/0"}), "row 1: field 'completion' is missing"),
        (_lines({"task_id": "Tiny/0", "completion": 7}), "field 'completion' must be str, not int"),
        (_lines({"task_id": "Tiny/0", "completion": "", "score": 1}), "unknown field 'score'"),
        (_lines({"task_id": "Tiny/9", "completion": ""}), "'Tiny/9', which the suite does not have"),
        (
            _lines({"task_id": "Tiny/0", "completion": ""}, {"task_id": True, "completion": ""}),
            "row 2: field 'task_id'",
        ),
        (_lines(*({"task_id": f"Tiny/{i}", "completion": ""} for i in (0, 0, 1))), "Tiny/1 has 1 and Tiny/0 has 2"),
        (b"", "there is none; give JSON lines"),
    ],
)
def test_malformed_completions_are_refused_by_row_and_field(data: bytes, message: str, tmp_path: Path) -> None:
    _, problems, _ = make_suite(tmp_path)
    with pytest.raises(BadFile) as caught:
        read_completions(data, problems)
    assert message in str(caught.value)


class _Home:
    """An address that publishes `content`."""

    def __init__(self, content: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/tiny.jsonl" else 404)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/tiny.jsonl"


@pytest.fixture
def homes() -> Iterator[list[_Home]]:
    """Published addresses that a test adds; closed afterwards."""
    opened: list[_Home] = []
    yield opened
    for home in opened:
        home.server.shutdown()
        home.server.server_close()


def _published(homes: list[_Home], suite: Suite, content: bytes) -> Suite:
    homes.append(home := _Home(content))
    threading.Thread(target=home.server.serve_forever, daemon=True).start()
    return replace(suite, data=replace(suite.data, url=home.url))


def test_data_comes_from_the_store_then_a_folder_then_its_home(tmp_path: Path, homes: list[_Home]) -> None:
    suite, _, data = make_suite(tmp_path)
    published = _published(homes, suite, data)
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "data"
    folder.mkdir()
    source = DataSource(store, folder)
    assert source.where(published) == published.data.url
    (folder / suite.data.file).write_bytes(data)
    assert source.where(published) == str(folder / suite.data.file)
    assert source.read(published) == data
    assert source.where(published) == "store"


def test_downloaded_data_is_stored(tmp_path: Path, homes: list[_Home]) -> None:
    suite, _, data = make_suite(tmp_path)
    store = LocalStore(tmp_path / "store")
    assert DataSource(store).read(_published(homes, suite, data)) == data
    assert store.get_bytes(suite.data.digest) == data


def test_data_with_another_digest_is_refused_and_not_stored(tmp_path: Path, homes: list[_Home]) -> None:
    suite, _, data = make_suite(tmp_path)
    store = LocalStore(tmp_path / "store")
    with pytest.raises(BadSuite, match="has digest sha256:.*declares"):
        DataSource(store).read(_published(homes, suite, data + b"\n"))
    assert not list(store.list_blobs())
    with pytest.raises(BadSuite, match="declares"):
        check_digest(suite, digest_bytes(b"other"))
    check_digest(suite, "")


def test_a_home_that_does_not_answer_is_a_retryable_error(tmp_path: Path, homes: list[_Home]) -> None:
    suite, _, data = make_suite(tmp_path)
    published = _published(homes, suite, data)
    away = replace(published, data=replace(published.data, url=published.data.url + "x"))
    with pytest.raises(DataUnavailable, match=r"404.*--data"):
        DataSource(LocalStore(tmp_path)).read(away)


def test_without_download_missing_data_is_named_with_its_remedy(tmp_path: Path) -> None:
    suite, _, _ = make_suite(tmp_path)
    with pytest.raises(UnknownBlob, match=r"tiny is not stored; name the folder that holds tiny\.jsonl with --data"):
        DataSource(LocalStore(tmp_path), can_download=False).where(suite)


def test_the_basic_suite_needs_nothing_outside_the_repository(tmp_path: Path) -> None:
    data = DataSource(LocalStore(tmp_path), can_download=False).read(find_suite("basic"))
    assert len(data.splitlines()) == 200
