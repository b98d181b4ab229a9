"""A model hub on loopback that speaks the hub's HTTP API, with the faults a real one shows.

Small files are served directly; weights, as on the real hub, by a redirect to another address that answers ranges. A
fault is set for a path of the API and counts down: `hub.fail("/api/models/ORG/NAME", 429, times=1)`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_LARGE = (".safetensors", ".gguf")


@dataclass
class Fault:
    """What a path answers instead: a status, or (200) a body cut short or altered."""

    status: int
    times: int
    code: str = ""
    retry_after: str = ""
    body: str = ""


@dataclass
class Hub:
    """Repositories (ORG/NAME to folder) and faults (beginning of a path to what goes wrong)."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range header of every request."""
    token: str = ""
    """If set, requests must bear it."""

    def fail(
        self, path: str, status: int, *, times: int = 1_000, code: str = "", retry_after: str = "", body: str = ""
    ) -> None:
        """Lets requests for paths that begin so fail `times` times; `body` is "cut" or "altered" for status 200."""
        self.faults[path] = Fault(status, times, code, retry_after, body)


@contextmanager
def model_hub() -> Iterator[Hub]:
    """A running hub without repositories."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        fault = self._fault(path)
        if fault is not None and fault.status != 200:
            self._send(fault.status, {"Retry-After": fault.retry_after, "X-Error-Code": fault.code}, b"{}")
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            self._repository(match[1], match[2])
        elif match := re.fullmatch(r"/(cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[2], match[4], is_cdn=bool(match[1]), body=fault.body if fault else "")
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")

    def _fault(self, path: str) -> Fault | None:
        for start, fault in self.hub.faults.items():
            if path.startswith(start) and fault.times and (self.command == "GET" or fault.status != 200):
                fault.times -= 1
                return fault
        return None

    def _repository(self, name: str, revision: str) -> None:
        folder = self.hub.repositories.get(name)
        if folder is None or revision not in ("main", "v1", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound" if folder else "RepoNotFound"}, b"{}")
            return
        siblings = [_sibling(path) for path in sorted(folder.iterdir())]
        value = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _file(self, name: str, path: str, *, is_cdn: bool, body: str) -> None:
        file = self.hub.repositories[name] / path if name in self.hub.repositories else None
        if file is None or not file.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}")
            return
        content = file.read_bytes()
        is_large = file.suffix in _LARGE
        etag = hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if is_large and not is_cdn:
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            self._send(302, {**headers, **linked, "Location": f"{self.hub.url}/cdn{self.path}"}, b"")
            return
        if body == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if start:
            begin, end = int(start[1]), int(start[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            self._send(206, headers, content[begin : end + 1], cut=body == "cut")
        else:
            self._send(200, headers, content, cut=body == "cut")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def git_hash(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sibling(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    value: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": git_hash(content)}
    if path.suffix in _LARGE:
        value["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return value
