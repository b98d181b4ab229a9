"""API keys: a file of hashes, and nothing that tells a near miss from a far one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.http.config import HttpConfig
from gateway.tenants.keys import ApiKeys, Quota, Tenant, hash_key
from smeltkit.errors import BadApiKey, BadConfig, KeyDenied

ALICE = Tenant(name="alice")


def test_without_keys_everybody_is_let_in() -> None:
    everybody = ApiKeys.from_file("").check("")
    assert (everybody.name, dict(everybody.quotas), everybody.may_use("anything")) == ("", {}, True)


def test_holder_of_a_key_is_named() -> None:
    keys = ApiKeys({hash_key("sk-1"): ALICE, hash_key("sk-2"): Tenant(name="bob")})
    assert keys.check("Bearer sk-2").name == "bob"


def test_what_a_tenant_may_do_holds_for_all_of_its_keys(tmp_path: Path) -> None:
    """So that a new key can be handed out before the old one goes; names mean what they mean elsewhere."""
    file = tmp_path / "keys"
    options = "tokens=1000/60 models=ore-11m,ore-11m:q8_0 gpu=5/60"
    file.write_text(f"alice {hash_key('old')}\nbob {hash_key('b')}\nalice {hash_key('new')} {options}\n")
    keys = ApiKeys.from_file(str(file))
    alice = keys.check("Bearer old")
    assert keys.check("Bearer new") is alice
    assert alice.quotas == {"tokens": Quota(allowed=1000, window_s=60), "gpu": Quota(allowed=5, window_s=60)}
    assert [alice.may_use(name) for name in ("ore-11m", "ore-11m:latest", "ore-11m:q8_0")] == [True] * 3
    for name in ("ore-11m:bf16", "ore-11", hash_key("a digest of whatever")):
        with pytest.raises(KeyDenied, match="alice may not use .*; it may use ore-11m:latest, ore-11m:q8_0"):
            alice.check_model(name)
    assert keys.check("Bearer b").may_use(hash_key("a digest of whatever"))


def test_keys_that_change_count_at_once_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    file, other = tmp_path / "keys", tmp_path / "other"
    file.write_text(f"alice {hash_key('first')}\n")
    keys = ApiKeys.from_file(str(file))
    other.write_text(f"alice {hash_key('second')}\n")
    other.replace(file)
    assert keys.check("Bearer second").name == "alice"
    with pytest.raises(BadApiKey):
        keys.check("Bearer first")
    for spoil in (lambda: file.write_text(""), lambda: file.write_text("nonsense"), file.unlink):
        spoil()
        assert keys.check("Bearer second").name == "alice"


def test_a_key_for_completions_opens_no_other_door() -> None:
    """A key that was handed out for the HTTP edge must not store files and start jobs without a bound."""
    stores = Tenant(name="bob", quotas={"bytes": Quota(allowed=1, window_s=1)})
    keys = ApiKeys({hash_key("sk-1"): ALICE, hash_key("sk-2"): stores})
    assert (keys.holder_at_grpc("sk-2"), keys.holder_at_grpc("sk-3"), ApiKeys({}).holder_at_grpc("")) == ("bob", "", "")
    with pytest.raises(KeyDenied, match="alice is for completions at the HTTP edge; .* needs bytes="):
        keys.holder_at_grpc("sk-1")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer sk-", "sk-1", "Basic sk-1", f"Bearer {hash_key('sk-1')}"]
)
def test_wrong_credentials_are_refused(header: str) -> None:
    with pytest.raises(BadApiKey, match="Authorization: Bearer KEY"):
        ApiKeys({hash_key("sk-1"): ALICE}).check(header)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody\n",
        "alice\n",
        "alice sk-plain\n",
        f"alice {hash_key('x')} more\n",
        f"a/b {hash_key('x')}\n",
        f"alice {hash_key('x')}\nbob {hash_key('x')}\n",
        f"alice {hash_key('x')} tokens=5\n",
        f"alice {hash_key('x')} tokens=0/60\n",
        f"alice {hash_key('x')} bytes=1GB/60\n",
        f"alice {hash_key('x')} gpu=5\n",
        f"Alice {hash_key('x')} bytes=5/60\n",
        f"alice {hash_key('x')} models=no such\n",
        f"alice {hash_key('x')} models=\n",
        f"alice {hash_key('x')} models=a models=b\n",
        f"alice {hash_key('x')} rate=5\n",
        f"alice {hash_key('x')} models=a\nalice {hash_key('y')} models=b\n",
        "alice sha256:abc\n",
    ],
)
def test_malformed_file_is_a_bad_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadConfig, match="api_keys_file"):
        ApiKeys.from_file(str(file))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bob HASH bytes=0/60", "bytes=0/60 must be bytes=COUNT/SECONDS .*COUNT >= 1 and SECONDS >= 1"),
        ("bob HASH token=5/60", "'token=5/60' is no option of bob; did you mean tokens"),
        ("bob HASH gpu=5/60 gpu=6/60", "gpu= of bob is given twice"),
        ("bob USED", "the key of bob is that of an earlier line, of alice"),
        ("bob sk-secret", "after bob comes the hash of the key, sha256: and 64 digits"),
        ("bob", "after bob comes the hash of the key"),
        ("default HASH bytes=5/60", "default is what jobs of the platform itself go by"),
        ("bo/b HASH", "the tenant 'bo/b' must be 1 to 64 letters"),
    ],
)
def test_each_mistake_in_a_line_has_its_own_words(tmp_path: Path, line: str, said: str) -> None:
    """With the number of the line; a key that was written in clear is not repeated."""
    file = tmp_path / "keys"
    text = line.replace("HASH", hash_key("fresh")).replace("USED", hash_key("used"))
    file.write_text(f"alice {hash_key('used')}\n{text}\n")
    with pytest.raises(BadConfig, match=f"api_keys_file line 2: {said}") as refused:
        ApiKeys.from_file(str(file))
    assert "secret" not in str(refused.value)


def test_missing_file_is_a_bad_config(tmp_path: Path) -> None:
    """An edge that was to have keys must not open without them."""
    with pytest.raises(BadConfig, match="cannot be read"):
        ApiKeys.from_file(str(tmp_path / "none"))


@pytest.mark.parametrize("field", ["request_max_bytes", "request_timeout_s", "keepalive_s"])
def test_setting_out_of_range_names_field_and_range(field: str) -> None:
    with pytest.raises(BadConfig, match=f"{field}=0 is out of range"):
        HttpConfig(**{field: 0})  # type: ignore[arg-type]
