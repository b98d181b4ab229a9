"""Settings: typed, checked, every key read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from smeltkit.config import PlatformConfig, from_environment
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Settings of the tests."""

    address: str
    slots: int = 2
    is_fast: bool = False
    ratio: float | None = None
    names: tuple[str, ...] = ()


def test_fields_are_read_from_prefixed_variables() -> None:
    """Each field comes from its own variable, with its own type."""
    environ = {"X_ADDRESS": "a:1", "X_SLOTS": "4", "X_IS_FAST": "yes", "X_RATIO": "0.5", "X_NAMES": "a, b", "Y": "z"}
    assert from_environment(Sample, "X_", environ) == Sample(
        address="a:1", slots=4, is_fast=True, ratio=0.5, names=("a", "b")
    )


def test_unread_variable_is_refused_with_a_suggestion() -> None:
    """R-006: a key that nobody reads is an error that names the likely one."""
    with pytest.raises(BadConfig, match="X_SLOTTS is set but nothing reads it; did you mean X_SLOTS"):
        from_environment(Sample, "X_", {"X_ADDRESS": "a", "X_SLOTTS": "4"})


def test_missing_variable_is_named() -> None:
    """A setting without default must be there."""
    with pytest.raises(BadConfig, match="X_ADDRESS must be set"):
        from_environment(Sample, "X_", {})


@pytest.mark.parametrize("key,value", [("X_SLOTS", "two"), ("X_IS_FAST", "maybe"), ("X_RATIO", "half")])
def test_malformed_value_names_key_and_text(key: str, value: str) -> None:
    """The message leads to the variable."""
    with pytest.raises(BadConfig, match=f"{key}='{value}'"):
        from_environment(Sample, "X_", {"X_ADDRESS": "a", key: value})


def test_secrets_do_not_show_in_the_repr() -> None:
    """R-127: a logged config holds no secret."""
    config = PlatformConfig(
        nats_url="nats://h", nats_password="p4ss", s3_endpoint="h:1", s3_access_key="k", s3_secret_key="s3cret"
    )
    assert "p4ss" not in repr(config) and "s3cret" not in repr(config)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("s3_endpoint", "http://127.0.0.1:9000", "HOST:PORT, without http://"),
        ("s3_endpoint", "127.0.0.1:9000/smelt", "without http:// or a path"),
        ("s3_bucket", "Kept_Here", "small letters"),
        ("s3_bucket", "a", "3 to 63"),
    ],
)
def test_what_no_store_would_take_is_refused_at_once(field: str, value: str, says: str) -> None:
    """R-006: with the value and the form, before anything is asked of a server."""
    keys = {"s3_endpoint": "h:1", "s3_access_key": "k", "s3_secret_key": "s"}
    with pytest.raises(BadConfig, match=says):
        PlatformConfig(nats_url="nats://h", **{**keys, field: value})  # type: ignore[arg-type]
