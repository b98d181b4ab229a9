"""The model hub, through the real huggingface_hub, against a server that speaks its API and misbehaves like one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from services.importer.hub import HubRepository
from services.importer.sources import Snapshot
from smeltkit.errors import BadRequest, DigestMismatch, HubDenied, HubUnavailable, UnknownSource, UnsafeFile
from smeltkit.testing.hub import COMMIT, Hub, model_hub
from smeltkit.testing.tiny_models import write_tiny_model

NAME = "smelt-org/tiny"


@pytest.fixture
def tiny_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one tiny repository, and a cache of the library that is the test's own."""
    write_tiny_model(tmp_path / "tiny", "qwen3", shards=2)
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "tiny" / "modeling_tiny.py").write_text("raise SystemExit('remote code ran')\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with model_hub() as running:
        running.repositories[NAME] = tmp_path / "tiny"
        yield running


def fetch(hub: Hub, folder: Path, revision: str = "") -> Snapshot:
    """Takes a snapshot of the repository and fetches all of it into `folder`."""
    repository = HubRepository(NAME, revision, endpoint=hub.url)
    snapshot = repository.snapshot()
    folder.mkdir()
    repository.fetch(snapshot, snapshot.files, folder, lambda _: None)
    return snapshot


def test_commit_is_pinned_and_files_are_those_of_the_hub(tiny_hub: Hub, tmp_path: Path) -> None:
    """A branch resolves once; everything after is asked for by commit. Weights come by redirect."""
    snapshot = fetch(tiny_hub, tmp_path / "out")
    assert snapshot.origin == f"hf://{NAME}@{COMMIT}"
    for name in snapshot.files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()
    resolved = [path for _, path, _ in tiny_hub.requests if "/resolve/" in path and path.endswith(".safetensors")]
    assert resolved and all(f"/resolve/{COMMIT}/" in path for path in resolved)
    assert any(path.startswith("/cdn/") for path in resolved)


def test_code_is_never_fetched(tiny_hub: Hub, tmp_path: Path) -> None:
    """R-030: a Python file in the repository is listed as ignored and never asked for."""
    assert "modeling_tiny.py" in fetch(tiny_hub, tmp_path / "out").ignored
    assert not any("modeling_tiny" in path for _, path, _ in tiny_hub.requests)


def test_second_fetch_moves_no_weights(tiny_hub: Hub, tmp_path: Path) -> None:
    """What the library's cache holds is not sent again."""
    fetch(tiny_hub, tmp_path / "first")
    tiny_hub.requests.clear()
    fetch(tiny_hub, tmp_path / "second")
    assert not [path for method, path, _ in tiny_hub.requests if method == "GET" and path.startswith("/cdn/")]


def test_offline_uses_the_cache_and_still_verifies(
    tiny_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE: the same snapshot without any request; a rotten cache is noticed."""
    online = fetch(tiny_hub, tmp_path / "online")
    tiny_hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = fetch(tiny_hub, tmp_path / "offline")
    assert (offline.origin, offline.parameters) == (online.origin, online.parameters)
    assert not tiny_hub.requests
    rotten = next((tmp_path / "cache").glob("**/snapshots/*/config.json"))
    data = rotten.read_bytes()
    rotten.resolve().write_bytes(data[:-1] + b" ")
    with pytest.raises((DigestMismatch, HubUnavailable)):
        fetch(tiny_hub, tmp_path / "rotten")


def test_offline_without_a_cache_says_so(tiny_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the remedy."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        fetch(tiny_hub, tmp_path / "out")


def test_unknown_repository_and_revision_are_not_found(tiny_hub: Hub, tmp_path: Path) -> None:
    """404 with the hub's own error codes."""
    with pytest.raises(UnknownSource, match="smelt-org/none"):
        HubRepository("smelt-org/none", endpoint=tiny_hub.url).snapshot()
    with pytest.raises(UnknownSource, match="v9"):
        fetch(tiny_hub, tmp_path / "out", "v9")


def test_private_repository_is_denied_without_a_token(tiny_hub: Hub, tmp_path: Path) -> None:
    """401: the hub does not say whether it exists."""
    tiny_hub.token = "secret"
    with pytest.raises(HubDenied, match="HF_TOKEN"):
        fetch(tiny_hub, tmp_path / "out")


def test_gated_repository_is_denied_with_what_to_do(tiny_hub: Hub, tmp_path: Path) -> None:
    """403 on the files of a repository whose listing is public."""
    tiny_hub.fail(f"/{NAME}/resolve", 403, code="GatedRepo")
    with pytest.raises(HubDenied, match="gated"):
        fetch(tiny_hub, tmp_path / "out")


def test_rate_limit_is_told_with_its_wait(tiny_hub: Hub, tmp_path: Path) -> None:
    """429 with Retry-After becomes a retryable error that carries the seconds."""
    tiny_hub.fail("/api/models", 429, retry_after="7")
    with pytest.raises(HubUnavailable, match="429") as caught:
        fetch(tiny_hub, tmp_path / "out")
    assert caught.value.retryable and caught.value.retry_after_s == 7


def test_download_waits_out_a_short_rate_limit(tiny_hub: Hub, tmp_path: Path) -> None:
    """One 429 on the weights: the library waits and goes on."""
    tiny_hub.fail("/cdn/", 429, retry_after="1", times=1)
    assert fetch(tiny_hub, tmp_path / "out").weight_files


def test_broken_body_resumes_where_it_broke(tiny_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection cut in the middle of the weights: the rest is asked for by range, and the digest holds."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    tiny_hub.fail("/cdn/", 200, body="cut", times=1)
    fetch(tiny_hub, tmp_path / "out")
    assert any(path.startswith("/cdn/") and range for _, path, range in tiny_hub.requests)


def test_altered_file_is_fetched_again_and_then_refused(tiny_hub: Hub, tmp_path: Path) -> None:
    """A body of the right length and the wrong bytes never reaches a bundle."""
    tiny_hub.fail("/cdn/", 200, body="altered", times=1)
    fetch(tiny_hub, tmp_path / "once")
    tiny_hub.fail(f"/{NAME}/resolve/{COMMIT}/tokenizer.json", 200, body="altered")
    for path in (tmp_path / "cache").glob("**/snapshots/*/tokenizer.json"):
        path.resolve().unlink()
        path.unlink()
    with pytest.raises(DigestMismatch, match=r"tokenizer\.json"):
        fetch(tiny_hub, tmp_path / "twice")


def test_hub_that_is_down_is_unavailable(tmp_path: Path) -> None:
    """Nobody listens: retryable, with the name of what was wanted."""
    with pytest.raises(HubUnavailable, match=NAME):
        HubRepository(NAME, endpoint="http://127.0.0.1:9").snapshot()


def test_pickle_only_repository_is_refused(tiny_hub: Hub, tmp_path: Path) -> None:
    """R-030."""
    for path in (tmp_path / "tiny").glob("model*"):
        path.unlink()
    (tmp_path / "tiny" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeFile, match="pytorch_model"):
        fetch(tiny_hub, tmp_path / "out")


@pytest.mark.parametrize("name", ["", "one", "a/b/c", "../x/y", "org/../x", "org/na me", "/abs/path", "org/x?y=1"])
def test_names_that_are_no_repository_are_refused(name: str) -> None:
    """Before any request."""
    with pytest.raises(BadRequest):
        HubRepository(name)
