"""Manifests: canonical, bounded, closed against paths that leave their folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import BadManifest
from smeltkit.ids import digest_bytes
from smeltkit.manifest import Descriptor, Manifest, canonical_json, check_path

NAMES = st.text("abcdef", min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
LAYERS = st.lists(
    st.builds(
        Descriptor,
        media_type=NAMES,
        digest=st.binary(max_size=4).map(digest_bytes),
        size_bytes=st.integers(0, 2**50),
        path=NAMES,
    ),
    max_size=4,
    unique_by=lambda one: one.path,
)


@given(st.dictionaries(NAMES, JSON, max_size=4), LAYERS)
def test_manifest_survives_its_bytes(config: dict[str, object], layers: list[Descriptor]) -> None:
    """Writing and reading gives an equal value with the same digest."""
    manifest = Manifest(artifact_type="t", config=config, layers=tuple(layers), subject=digest_bytes(b"s"))
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest and again.digest == manifest.digest


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_other_bytes_are_a_typed_error(data: bytes) -> None:
    """A crafted manifest never crashes its reader."""
    with pytest.raises(BadManifest):
        Manifest.from_bytes(data)


def test_bytes_that_are_not_canonical_are_refused() -> None:
    """Two byte strings for one artifact would be two identities."""
    data = Manifest(artifact_type="t", config={"b": 1, "a": 2}).to_bytes()
    assert Manifest.from_bytes(data)
    with pytest.raises(BadManifest, match="canonical"):
        Manifest.from_bytes(data.replace(b",", b", ", 1))


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a//b", "a/", "./a", "a\0b"])
def test_path_that_leaves_its_folder_is_refused(path: str) -> None:
    """A manifest cannot make its reader write elsewhere."""
    with pytest.raises(BadManifest):
        check_path(path)


def test_not_a_number_cannot_be_stored() -> None:
    """JSON has no NaN; a missing value must be said, not smuggled."""
    with pytest.raises(ValueError):
        canonical_json({"loss": float("nan")})
