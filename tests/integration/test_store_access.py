"""Who must not reach what in the object store: every cell is tried, on a real server with a key for each user."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from smeltkit.blobs.access import DELETE, MAY, OPERATOR, READ, WRITE, may, policy
from smeltkit.blobs.bucket import Bucket
from smeltkit.blobs.s3 import S3Store
from smeltkit.blobs.source import crc32_text
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadRequest, StoreDenied
from smeltkit.testing.s3 import S3Server, fresh_store

BEGINS = sorted({begin for begins in MAY.values() for begin in begins if begin})
KEYS = [f"{begin}/probe-of-access" for begin in (*BEGINS, "refs/backups", "blobs-of-others", "elsewhere")]
SERVICES = [user for user in MAY if user != OPERATOR]


def put(bucket: Bucket, key: str) -> None:
    bucket.put(key, b"x", 1, crc32_text(zlib.crc32(b"x")))


TRIES: dict[str, Callable[[Bucket, str], object]] = {
    READ: lambda bucket, key: b"".join(bucket.stream(key, 0, 1)),
    WRITE: put,
    DELETE: lambda bucket, key: bucket.delete(key),
}


@pytest.fixture(scope="module")
def whole(s3: S3Server) -> Bucket:
    """The bucket of the users, for somebody who may do all there; one object lies at each key."""
    S3Store(s3.config).ensure_bucket()
    bucket = Bucket(s3.config_of(OPERATOR))
    for key in KEYS:
        put(bucket, key)
    return bucket


def is_let(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except StoreDenied:
        return False
    return True


@pytest.mark.parametrize("user", list(MAY))
def test_each_right_of_each_user_is_what_the_table_says(s3: S3Server, whole: Bucket, user: str) -> None:
    bucket = Bucket(s3.config_of(user))
    found, expected = {}, {}
    for key in KEYS:
        for right, attempt in TRIES.items():
            found[right, key] = is_let(lambda attempt=attempt, key=key: attempt(bucket, key))  # type: ignore[misc]
            expected[right, key] = may(user, right, key)
        put(whole, key)
    assert found == expected


@pytest.mark.parametrize("user", SERVICES)
def test_no_service_reaches_another_bucket_or_the_bucket_itself(
    s3: S3Server, whole: Bucket, user: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = fresh_store(s3, tmp_path_factory.mktemp("uploads"))
    digest = other.put_bytes(b"secret of another platform")
    theirs = replace(s3.config_of(user), s3_bucket=other.config.s3_bucket)
    bucket = Bucket(theirs)
    for attempt in TRIES.values():
        assert not is_let(lambda attempt=attempt: attempt(bucket, f"blobs/sha256/{digest[7:9]}/{digest[9:]}"))  # type: ignore[misc]
    assert not is_let(lambda: list(bucket.entries("")))
    assert not is_let(Bucket(replace(theirs, s3_bucket=f"new-bucket-of-{user}")).ensure)
    assert other.get_bytes(digest) == b"secret of another platform"


@pytest.mark.parametrize("user", SERVICES)
def test_an_upload_in_parts_needs_the_same_right(s3: S3Server, whole: Bucket, user: str) -> None:
    bucket = Bucket(s3.config_of(user))
    for key in KEYS:
        began = is_let(lambda key=key: bucket.abort(key, bucket.begin(key)))  # type: ignore[misc]
        assert began == may(user, WRITE, key), key


def test_an_address_that_the_gateway_signs_carries_no_more_than_the_gateways_rights(
    s3: S3Server, whole: Bucket
) -> None:
    gateway = Bucket(s3.config_of("gateway"))
    with httpx.Client() as http:
        for key in KEYS:
            for method, right in (("GET", READ), ("PUT", WRITE)):
                answer = http.request(
                    method, gateway.presign(method, key, {}), content=b"x" if method == "PUT" else None
                )
                assert (answer.status_code == 200) == may("gateway", right, key), (method, key)
            put(whole, key)


def test_whoever_has_no_key_or_a_wrong_one_reaches_nothing(s3: S3Server, whole: Bucket) -> None:
    address = f"http://{s3.config.s3_endpoint}/{s3.config.s3_bucket}"
    with httpx.Client() as http:
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            answers = {key: http.request(method, f"{address}/{key}").status_code for key in KEYS}
            assert answers == dict.fromkeys(KEYS, 403), method
        assert http.get(address).status_code == 403
    importer = s3.config_of("importer")
    strangers: list[PlatformConfig] = [
        replace(importer, s3_secret_key=s3.config_of("evaluator").s3_secret_key),
        replace(importer, s3_access_key="sandbox"),
    ]
    for config in strangers:
        with pytest.raises(StoreDenied, match="the object store at"):
            S3Store(config).prove()


def test_a_process_with_a_right_key_starts(s3: S3Server, whole: Bucket) -> None:
    for user in MAY:
        S3Store(s3.config_of(user)).prove()


def test_the_sandbox_has_no_policy() -> None:
    with pytest.raises(BadRequest, match="has no key"):
        policy("sandbox", "smelt")
