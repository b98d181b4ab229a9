"""The node cache: fetched once, shared, verified, evicted by use and never while in use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.local import LocalStore
from smeltkit.blobs.store import Progress
from smeltkit.errors import BadConfig, DigestMismatch, DiskFull, UnknownBlob
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest


class CountingStore(LocalStore):
    """A folder store that counts fetches by digest."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fetches: Counter[str] = Counter()

    def fetch(self, digest: str, path: Path, *, progress: Progress | None = None) -> None:
        self.fetches[digest] += 1
        super().fetch(digest, path, progress=progress)


@pytest.fixture
def counting(tmp_path: Path) -> CountingStore:
    """An empty counting store."""
    return CountingStore(tmp_path / "store")


def artifact(store: LocalStore, files: dict[str, bytes]) -> Manifest:
    """A stored artifact of these files."""
    layers = tuple(
        Descriptor(media_type="text/plain", digest=store.put_bytes(data), size_bytes=len(data), path=path)
        for path, data in files.items()
    )
    manifest = Manifest(artifact_type=REPORT_TYPE, layers=layers)
    store.put_manifest(manifest)
    return manifest


def test_view_holds_the_files_of_the_artifact(counting: CountingStore, tmp_path: Path) -> None:
    """Under their paths, and gone when the block ends."""
    cache = NodeCache(tmp_path / "cache", counting, 1000)
    with cache.materialize(artifact(counting, {"a.txt": b"1", "deep/b.txt": b"22", "twin.txt": b"1"})) as folder:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.txt")}
    assert found == {"a.txt": b"1", "deep/b.txt": b"22", "twin.txt": b"1"}
    assert not folder.exists()


def test_second_start_moves_no_bytes(counting: CountingStore, tmp_path: Path) -> None:
    """R-129: also by another process, which sees only the folder."""
    manifest = artifact(counting, {"weights": b"w" * 500, "config": b"{}"})
    for _ in range(2):
        with NodeCache(tmp_path / "cache", counting, 1000).materialize(manifest):
            pass
    assert set(counting.fetches.values()) == {1}


def test_artifacts_share_equal_files(counting: CountingStore, tmp_path: Path) -> None:
    """R-129: a file of the same digest is fetched once, whatever artifact asks for it."""
    cache = NodeCache(tmp_path / "cache", counting, 1000)
    first, second = artifact(counting, {"tokenizer": b"same", "w": b"1"}), artifact(counting, {"t": b"same", "w": b"2"})
    with cache.materialize(first), cache.materialize(second):
        assert cache.size_bytes() == 6
    assert max(counting.fetches.values()) == 1


def test_only_the_files_asked_for_are_fetched(counting: CountingStore, tmp_path: Path) -> None:
    """A tokenizer can be read without the weights."""
    cache = NodeCache(tmp_path / "cache", counting, 1000)
    manifest = artifact(counting, {"weights": b"w" * 900, "tokenizer": b"t"})
    with cache.materialize(manifest, paths=["tokenizer"]) as folder:
        assert [path.name for path in folder.iterdir()] == ["tokenizer"]
    assert sum(counting.fetches.values()) == 1
    with pytest.raises(UnknownBlob, match="no file vocab"), cache.materialize(manifest, paths=["vocab"]):
        pass


def test_many_threads_fetch_once(counting: CountingStore, tmp_path: Path) -> None:
    """Whoever comes second waits for the first."""
    cache, manifest = NodeCache(tmp_path / "cache", counting, 10**6), artifact(counting, {"w": b"x" * 10**5})
    found: list[int] = []

    def use() -> None:
        with cache.materialize(manifest) as folder:
            found.append((folder / "w").stat().st_size)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [10**5] * 8
    assert counting.fetches.total() == 1


def test_least_recently_used_goes_first(counting: CountingStore, tmp_path: Path) -> None:
    """A use renews a file's place."""
    cache = NodeCache(tmp_path / "cache", counting, 250)
    a, b, c = (artifact(counting, {"w": letter * 100}) for letter in (b"a", b"b", b"c"))
    for manifest in (a, b, a, c, a):
        with cache.materialize(manifest):
            pass
    assert counting.fetches == {a.layers[0].digest: 1, b.layers[0].digest: 1, c.layers[0].digest: 1}
    with cache.materialize(b):
        pass
    assert counting.fetches[b.layers[0].digest] == 2


def test_what_is_in_use_is_never_evicted(counting: CountingStore, tmp_path: Path) -> None:
    """A cache that is too small for what runs refuses instead of pulling files away."""
    cache = NodeCache(tmp_path / "cache", counting, 150)
    running, other = artifact(counting, {"w": b"a" * 100}), artifact(counting, {"w": b"b" * 100})
    with cache.materialize(running) as folder:
        with pytest.raises(DiskFull, match="lacks 50 for 100 more"), cache.materialize(other):
            pass
        assert (folder / "w").read_bytes() == b"a" * 100
    with cache.materialize(other):
        assert cache.size_bytes() == 100


def test_damaged_store_leaves_nothing_in_the_cache(counting: CountingStore, tmp_path: Path) -> None:
    """R-013: what is not verified never becomes a cached file."""
    cache, manifest = NodeCache(tmp_path / "cache", counting, 1000), artifact(counting, {"w": b"good"})
    counting._write(f"blobs/sha256/{manifest.layers[0].digest[7:9]}/{manifest.layers[0].digest[9:]}", b"evil")
    with pytest.raises(DigestMismatch), cache.materialize(manifest):
        pass
    assert cache.size_bytes() == 0
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size] == []


def test_file_written_through_its_link_is_fetched_again(counting: CountingStore, tmp_path: Path) -> None:
    """R-013: a write breaks the seal, so the next use verifies and repairs."""
    cache, manifest = NodeCache(tmp_path / "cache", counting, 1000), artifact(counting, {"w": b"good"})
    with cache.materialize(manifest) as folder:
        (folder / "w").chmod(0o644)
        (folder / "w").write_bytes(b"evil")
    with cache.materialize(manifest) as folder:
        assert (folder / "w").read_bytes() == b"good"
    assert counting.fetches.total() == 2


def test_touched_file_with_the_right_bytes_is_kept(counting: CountingStore, tmp_path: Path) -> None:
    """A broken seal costs one read of the file, not a transfer."""
    cache, manifest = NodeCache(tmp_path / "cache", counting, 1000), artifact(counting, {"w": b"good"})
    with cache.materialize(manifest) as folder:
        os.utime(folder / "w")
    with cache.materialize(manifest):
        pass
    assert counting.fetches.total() == 1


def test_derived_file_is_built_once(counting: CountingStore, tmp_path: Path) -> None:
    """A conversion that fails leaves nothing; one that worked is shared."""
    cache, builds = NodeCache(tmp_path / "cache", counting, 1000), []

    def build(path: Path) -> None:
        builds.append(path)
        path.write_bytes(b"converted")
        if len(builds) == 1:
            raise RuntimeError("converter died")

    with pytest.raises(RuntimeError), cache.derived("gguf of abc", build, size_bytes=9):
        pass
    assert cache.size_bytes() == 0
    for _ in range(2):
        with cache.derived("gguf of abc", build, size_bytes=9) as path:
            assert path.read_bytes() == b"converted"
    assert len(builds) == 2


def test_view_of_a_killed_process_is_taken_down(counting: CountingStore, tmp_path: Path) -> None:
    """Its files count as in use only until somebody needs the room."""
    manifest, other = artifact(counting, {"w": b"a" * 100}), artifact(counting, {"w": b"b" * 100})
    program = (
        "import sys, pathlib, time\n"
        "from smeltkit.blobs.cache import NodeCache\nfrom smeltkit.blobs.local import LocalStore\n"
        "store = LocalStore(pathlib.Path(sys.argv[1]))\n"
        "with NodeCache(pathlib.Path(sys.argv[2]), store, 150).materialize(store.get_manifest(sys.argv[3])):\n"
        "    print('in use', flush=True); time.sleep(600)\n"
    )
    arguments = [str(tmp_path / "store"), str(tmp_path / "cache"), manifest.digest]
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"in use\n"
    cache = NodeCache(tmp_path / "cache", counting, 150)
    with pytest.raises(DiskFull), cache.materialize(other):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with cache.materialize(other):
        assert len(list((tmp_path / "cache" / "views").glob("*.lock"))) == 1


def test_left_reservation_and_partial_of_a_killed_process_are_removed(counting: CountingStore, tmp_path: Path) -> None:
    """A fetch that was killed takes no room for ever."""
    cache, name = NodeCache(tmp_path / "cache", counting, 100), "ab" * 32
    (tmp_path / "cache" / "blobs" / f".{name}.partial").write_bytes(b"x" * 90)
    (tmp_path / "cache" / "reserved" / name).write_bytes(b"x" * 90)
    with cache.materialize(artifact(counting, {"w": b"a" * 100})):
        assert cache.size_bytes() == 100
    assert not (tmp_path / "cache" / "blobs" / f".{name}.partial").exists()


def test_cache_without_room_is_refused(counting: CountingStore, tmp_path: Path) -> None:
    """A size of nothing is a mistake in the settings."""
    with pytest.raises(BadConfig, match="more than 0"):
        NodeCache(tmp_path, counting, 0)


@settings(max_examples=40)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20))
def test_any_order_of_use_keeps_the_bound_and_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    """Whatever is opened, held and closed: right bytes, within the bound, refused only if held files fill it."""
    folder = tmp_path_factory.mktemp("cache")
    store = CountingStore(folder / "store")
    manifests = [artifact(store, {"w": bytes([65 + index]) * (40 + 10 * index)}) for index in range(6)]
    cache, bound = NodeCache(folder / "cache", store, 200), 200
    with ExitStack() as held:
        in_use: set[int] = set()
        for index, keep in steps:
            needed = sum(manifests[one].size_bytes for one in in_use | {index})
            with ExitStack() as use:
                try:
                    view = use.enter_context(cache.materialize(manifests[index]))
                except DiskFull:
                    assert needed > bound
                    continue
                assert (view / "w").read_bytes() == bytes([65 + index]) * (40 + 10 * index)
                assert cache.size_bytes() <= bound
                if keep:
                    in_use.add(index)
                    held.push(use.pop_all())
