"""How answers of an S3 server that misbehaves become our errors. The servers that behave are in the contract tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from smeltkit.blobs import bucket
from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig
from smeltkit.errors import DiskFull, SmeltError, StoreDenied, StoreUnavailable, UnknownBlob
from smeltkit.ids import digest_bytes

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answer: Answer) -> Iterator[S3Store]:
    """A store on a loopback server that answers every request but the one for the region by `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Reads the body, then answers."""
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.endswith("?location="):
                reply(self, 200, b"<LocationConstraint/>", "application/xml")
            else:
                answer(self)

        do_HEAD = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the screen."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    try:
        endpoint = f"127.0.0.1:{listener.server_port}"
        yield S3Store(PlatformConfig(nats_url="", s3_endpoint=endpoint, s3_access_key="a", s3_secret_key="b"))
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, content_type: str) -> None:
    """One whole answer."""
    handler.send_response(status)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@pytest.mark.parametrize("content_type", ["application/xml", "text/xml", "text/xml; charset=utf-8"])
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "NoSuchKey", UnknownBlob),
        (403, "AccessDenied", StoreDenied),
        (403, "SignatureDoesNotMatch", StoreDenied),
        (404, "NoSuchBucket", StoreUnavailable),
        (507, "XMinioStorageFull", DiskFull),
        (400, "QuotaExceeded", DiskFull),
        (418, "Teapot", StoreUnavailable),
    ],
)
def test_error_code_decides_whatever_the_content_type(
    status: int, code: str, error: type[SmeltError], content_type: str
) -> None:
    """The client reads application/xml only; other servers say text/xml."""
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    with server(lambda handler: reply(handler, status, body, content_type)) as store, pytest.raises(error):
        store.get_bytes(digest_bytes(b"x"))


def test_server_that_always_fails_may_be_full() -> None:
    """SeaweedFS answers 500 when its disk is full; the message says where to look."""
    with (
        server(lambda handler: reply(handler, 500, b"<Error><Code>InternalError</Code></Error>", "text/xml")) as store,
        pytest.raises(StoreUnavailable, match="its disk may be full, see its log"),
    ):
        store.put_bytes(b"x")


def test_page_of_a_proxy_is_no_object() -> None:
    """HTML where S3 should be is said to be so."""
    with (
        server(lambda handler: reply(handler, 400, b"<html>Bad gateway</html>", "text/html")) as store,
        pytest.raises(StoreUnavailable, match="does not answer as it should"),
    ):
        store.get_bytes(digest_bytes(b"x"))


def test_broken_connection_is_taken_up_where_it_broke() -> None:
    """The rest is asked for by its range; the whole is still verified."""
    data = bytes(range(256)) * 8192
    ranges: list[str] = []

    def half_at_first(handler: BaseHTTPRequestHandler) -> None:
        ranges.append(handler.headers["Range"])
        first, last = (int(text) for text in handler.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        handler.wfile.write(part[: len(part) // 2] if len(ranges) == 1 else part)
        if len(ranges) == 1:
            handler.close_connection = True

    with server(half_at_first) as store:
        assert store.get_bytes(digest_bytes(data), max_bytes=len(data)) == data
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=") and not ranges[1].startswith("bytes=0-")


@pytest.mark.parametrize("code", ["AccessDenied", "RequestTimeTooSkewed", "SignatureDoesNotMatch"])
@pytest.mark.parametrize(("step_s", "expected"), [(3600, StoreUnavailable), (-3600, StoreUnavailable), (0, SmeltError)])
def test_a_clock_that_is_off_is_no_lack_of_rights(
    code: str, step_s: int, expected: type[SmeltError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers refuse what is signed in another hour: the work is to be tried again, where the clock is right."""
    monkeypatch.setattr(bucket, "time", SimpleNamespace(time=lambda: time.time() + step_s))
    body = f"<Error><Code>{code}</Code></Error>".encode()
    with (
        server(lambda handler: reply(handler, 403, body, "application/xml")) as store,
        pytest.raises(expected) as caught,
    ):
        store.get_bytes(digest_bytes(b"x"))
    assert caught.value.retryable == (step_s != 0 or code == "RequestTimeTooSkewed")
    assert ("this machine's clock is" in caught.value.message) == (step_s != 0)
