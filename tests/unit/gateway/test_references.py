"""Names, digests and the beginnings of digests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.references import References
from smeltkit.catalog import Entry
from smeltkit.errors import AmbiguousReference, UnknownArtifact, UnknownModel
from smeltkit.ids import digest_digits

FIRST, SECOND, NAMED = (f"sha256:{begin}{'0' * 57}" for begin in ("abcdef1", "abcdef2", "1234567"))


class Names:
    """A catalogue with one name that looks like the beginning of a digest."""

    async def get(self, name: str) -> Entry | None:
        """The one entry."""
        entry = Entry(name="abcdef1:latest", digest=NAMED, artifact_type="", size_bytes=0, revision=1)
        return entry if name == "abcdef1" else None

    async def resolve(self, reference: str) -> str:
        """As the catalogue does for whole digests and names."""
        if not reference.startswith("sha256:"):
            raise UnknownModel(reference)
        return reference


class Digests:
    """A store that has two artifacts."""

    def list_manifests(self, digits: str = "") -> Iterator[str]:
        """Those that begin so."""
        return (digest for digest in (FIRST, SECOND) if digest.startswith(f"sha256:{digits}"))


@pytest.fixture
def references() -> References:
    """Names and digests as above."""
    catalog: Any = Names()
    store: Any = Digests()
    return References(catalog, store)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (FIRST, FIRST),
        (FIRST.removeprefix("sha256:"), FIRST),
        ("sha256:abcdef2", SECOND),
        ("abcdef20", SECOND),
        ("abcdef1", NAMED),
        ("sha256:abcdef1", FIRST),
    ],
)
async def test_unique_beginning_means_the_digest_and_a_name_goes_before_it(
    references: References, typed: str, meant: str
) -> None:
    """As tables show digests, so they can be typed."""
    assert await references.resolve(typed) == meant


async def test_beginning_of_two_digests_is_an_error_that_names_both(references: References) -> None:
    """Nothing is chosen by chance."""
    with pytest.raises(AmbiguousReference) as raised:
        await references.resolve("abcdef")
    assert FIRST in raised.value.message and SECOND in raised.value.message


async def test_beginning_of_no_digest_and_other_names_are_unknown(references: References) -> None:
    """Each with its own error."""
    with pytest.raises(UnknownArtifact, match="smelt models"):
        await references.resolve("999999")
    with pytest.raises(UnknownModel):
        await references.resolve("ore-11m")


@pytest.mark.parametrize("text", ["abcde", "ABCDEF", "abcdefg", "sha512:abcdef", "ore-11m:abcdef", FIRST, ""])
def test_text_of_another_form_has_no_digits(text: str) -> None:
    """Fewer than six digits, capitals, names and whole digests are none."""
    assert digest_digits(text) == ""
