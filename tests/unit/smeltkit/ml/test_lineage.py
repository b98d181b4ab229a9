"""A lineage names everything by digest and nothing of the machine it was made on."""

from __future__ import annotations

import pytest

from smeltkit.errors import BadDigest, BadManifest
from smeltkit.ids import digest_bytes
from smeltkit.ml.lineage import Lineage

DIGEST = digest_bytes(b"x")


def _lineage(**changes: object) -> Lineage:
    fields = {"operation": "quantize", "inputs": (DIGEST,), "code_revision": "0.1.0", **changes}
    return Lineage(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/model",
        "/tmp/x",
        "~/models",
        "C:\\models",
        "\\\\server\\share",
        "file:///srv/model",
        "from /data/x",
        "folder=/mnt/models",
        "https://user:secret@hub.example/x",
        "hf_abcdefghijklmnopqrstuv",
    ],
)
def test_host_path_or_credential_is_refused_anywhere(text: str) -> None:
    """R-127."""
    for changes in ({"origin": text}, {"parameters": {"deep": [{"er": text}]}}, {"parameters": {text: 1}}):
        with pytest.raises(BadManifest, match="host path or a credential"):
            _lineage(**changes)


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@0a1b2c",
        "https://hub.example/org/name",
        "upload",
        "a/b",
        "Q4_K_M",
        "1/2",
        "and/or",
        "ore-11m:q8_0",
    ],
)
def test_names_and_addresses_are_kept(text: str) -> None:
    lineage = _lineage(origin=text, parameters={"scheme": text})
    assert Lineage.from_dict(lineage.to_dict()) == lineage


def test_inputs_are_digests() -> None:
    with pytest.raises(BadDigest, match="never by name or path"):
        _lineage(inputs=("ore-11m",))


@pytest.mark.parametrize("changes", [{"operation": ""}, {"operation": "Import it"}, {"code_revision": ""}])
def test_operation_and_code_revision_are_required(changes: dict[str, str]) -> None:
    with pytest.raises(BadManifest, match=next(iter(changes))):
        _lineage(**changes)


@pytest.mark.parametrize("value", [{}, {"operation": 1}, {"inputs": 3}])
def test_malformed_stored_lineage_is_a_typed_error(value: dict[str, object]) -> None:
    with pytest.raises(BadManifest, match="malformed"):
        Lineage.from_dict(value)
