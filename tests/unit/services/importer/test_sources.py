"""Which files of a source make a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.importer.hub import is_intact
from services.importer.sources import Snapshot, SourceFile, choose_files, place
from smeltkit.errors import BadRequest, BundleIncomplete, SmeltError, UnsafeFile
from smeltkit.ids import digest_bytes
from smeltkit.testing.hub import git_hash

SIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def chosen(*paths: str) -> dict[str, str]:
    """Name in the bundle to path in the source."""
    files, _ = choose_files([SourceFile(path=path, size_bytes=1) for path in paths])
    return {name: file.path for name, file in files.items()}


def test_single_file_is_preferred_to_pickle_and_gguf() -> None:
    """Beside safetensors, the others are copies."""
    found = chosen(*SIDE, "model.safetensors", "pytorch_model.bin", "model-q4.gguf")
    assert set(found) == {*SIDE, "model.safetensors"}


def test_index_brings_all_its_shards_and_not_the_single_file() -> None:
    """Both forms at once would be two models."""
    found = chosen(*SIDE, "model.safetensors", "model.safetensors.index.json", *SHARDS)
    assert set(found) == {*SIDE, "model.safetensors.index.json", *SHARDS}


def test_shards_without_index_are_refused() -> None:
    """Nobody could tell whether they are all."""
    with pytest.raises(BundleIncomplete, match="index"):
        chosen(*SIDE, *SHARDS)


def test_one_gguf_gets_the_name_of_a_bundle() -> None:
    """Whatever it was called."""
    assert chosen("LICENSE", "Ore-11M.Q8_0.gguf") == {"LICENSE": "LICENSE", "model.gguf": "Ore-11M.Q8_0.gguf"}


def test_several_ggufs_are_refused_by_name() -> None:
    """The caller chooses, not the order of a listing."""
    with pytest.raises(BadRequest, match=r"a\.gguf, b\.gguf"):
        chosen("b.gguf", "a.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt"])
def test_pickle_alone_is_refused(name: str) -> None:
    """R-030."""
    with pytest.raises(UnsafeFile, match=name):
        chosen(*SIDE, name)


def test_no_weights_at_all_says_what_was_expected() -> None:
    """The message lists the forms."""
    with pytest.raises(BundleIncomplete, match=r"model\.safetensors"):
        chosen(*SIDE)


@pytest.mark.parametrize("name", ["LICENSE.md", "LICENSE.txt", "licence", "License"])
def test_licence_under_another_name_is_taken(name: str) -> None:
    """It travels with the model."""
    assert chosen("model.safetensors", name)["LICENSE"] == name


@given(
    st.lists(
        st.text(max_size=30) | st.sampled_from([*SIDE, *SHARDS, "a.gguf", "../model.safetensors", "x/config.json"])
    )
)
def test_only_known_names_ever_reach_the_folder(paths: list[str]) -> None:
    """No path escape: the name in the folder is never the source's."""
    try:
        found = chosen(*paths)
    except SmeltError:
        return
    assert all("/" not in name and ".." not in name for name in found)


def test_snapshot_tells_weights_from_side_files() -> None:
    """A plan reads the small files only."""
    files, ignored = choose_files(
        [SourceFile(path=path, size_bytes=5) for path in (*SIDE, "model.safetensors", "x.py")]
    )
    snapshot = Snapshot(origin="upload", files=files, ignored=ignored)
    assert (snapshot.weight_files, snapshot.size_bytes, snapshot.ignored) == (("model.safetensors",), 25, ("x.py",))
    assert set(snapshot.side_files) == set(SIDE)


def test_weights_are_linked_and_small_files_copied(tmp_path: Path) -> None:
    """What a bundle writes beside the weights must not reach the cache."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"x")
        place(tmp_path / name, tmp_path / f"placed-{name}")
    assert (tmp_path / "placed-model.safetensors").stat().st_nlink == 2
    assert (tmp_path / "placed-config.json").stat().st_nlink == 1


def test_content_is_held_against_size_and_hash(tmp_path: Path) -> None:
    """By sha256 where the hub tells it, else by git's sha1."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    good = [
        SourceFile(path="f", size_bytes=7, digest=digest_bytes(b"content")),
        SourceFile(path="f", size_bytes=7, git_hash=git_hash(b"content")),
    ]
    bad = [
        SourceFile(path="f", size_bytes=8, git_hash=git_hash(b"content")),
        SourceFile(path="f", size_bytes=7, digest=digest_bytes(b"other")),
        SourceFile(path="f", size_bytes=7, git_hash=git_hash(b"another")),
    ]
    assert [is_intact(path, file) for file in good + bad] == [True, True, False, False, False]
