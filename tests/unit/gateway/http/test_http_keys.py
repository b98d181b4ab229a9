"""API keys: a file of hashes, and nothing that tells a near miss from a far one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.http.config import HttpConfig
from gateway.http.keys import ApiKeys, hash_key
from smeltkit.errors import BadApiKey, BadConfig


def test_without_keys_everybody_is_let_in() -> None:
    assert ApiKeys.from_file("").check("") == ""


def test_holder_of_a_key_is_named() -> None:
    keys = ApiKeys({"alice": hash_key("sk-1"), "bob": hash_key("sk-2")})
    assert keys.check("Bearer sk-2") == "bob"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer sk-", "sk-1", "Basic sk-1", f"Bearer {hash_key('sk-1')}"]
)
def test_wrong_credentials_are_refused(header: str) -> None:
    with pytest.raises(BadApiKey, match="Authorization: Bearer KEY"):
        ApiKeys({"alice": hash_key("sk-1")}).check(header)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody\n",
        "alice\n",
        "alice sk-plain\n",
        f"alice {hash_key('x')} more\n",
        f"a/b {hash_key('x')}\n",
        f"alice {hash_key('x')}\nalice {hash_key('y')}\n",
        "alice sha256:abc\n",
    ],
)
def test_malformed_file_is_a_bad_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadConfig, match="api_keys_file"):
        ApiKeys.from_file(str(file))


def test_missing_file_is_a_bad_config(tmp_path: Path) -> None:
    """An edge that was to have keys must not open without them."""
    with pytest.raises(BadConfig, match="cannot be read"):
        ApiKeys.from_file(str(tmp_path / "none"))


@pytest.mark.parametrize("field", ["request_max_bytes", "request_timeout_s", "keepalive_s"])
def test_setting_out_of_range_names_field_and_range(field: str) -> None:
    with pytest.raises(BadConfig, match=f"{field}=0 is out of range"):
        HttpConfig(**{field: 0})  # type: ignore[arg-type]
