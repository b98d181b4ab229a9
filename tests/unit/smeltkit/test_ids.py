"""Digests, names and ids."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import BadDigest, BadName
from smeltkit.ids import check_digest, check_name, digest_bytes, digest_file, is_digest, new_id


@given(st.binary(max_size=4096))
def test_file_and_bytes_have_the_same_digest(data: bytes) -> None:
    """One definition of identity."""
    assert digest_file(io.BytesIO(data)) == (digest_bytes(data), len(data))
    assert is_digest(digest_bytes(data))


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "A" * 64, "md5:" + "0" * 64, "sha256:" + "0" * 63])
def test_malformed_digest_is_refused(text: str) -> None:
    """The message shows the form that is wanted."""
    with pytest.raises(BadDigest, match="sha256:"):
        check_digest(text)


@pytest.mark.parametrize("text,full", [("ore-11m", "ore-11m:latest"), ("team/ore:v2", "team/ore:v2")])
def test_name_gets_its_tag(text: str, full: str) -> None:
    """`latest` is the tag of a name without one."""
    assert check_name(text) == full


@pytest.mark.parametrize("text", ["", "Ore", "/a", "a//b", "../x", "a:b:c", "a/" * 5 + "a", "x" * 97, "a b", "a\n"])
def test_malformed_name_is_refused(text: str) -> None:
    """A name can never be a path outside its folder."""
    with pytest.raises(BadName):
        check_name(text)


def test_ids_are_unique_and_prefixed() -> None:
    """Ten thousand ids, no collision."""
    made = {new_id("job") for _ in range(10_000)}
    assert len(made) == 10_000
    assert all(one.startswith("job-") and len(one) == 28 for one in made)
