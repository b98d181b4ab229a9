"""Who may speak gRPC, NATS or S3: modules whose name says so. The rest is domain code that any transport can call."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "nats", "minio", "urllib3"}
SPEAKERS = {
    *("__main__", "servicer", "worker", "inference_client", "sandbox_client", "hub", "client"),
    *("channel", "pool", "replica"),
}
"""Modules that may import a transport: they wire, translate or call."""
LIBRARY = ("rpc", "bus", "jobs", "blobs", "testing")
DOMAIN = sorted(
    path
    for path in (*(ROOT / "services").rglob("*.py"), *(ROOT / "smeltkit").rglob("*.py"))
    if path.stem not in SPEAKERS and path.relative_to(ROOT).parts[1] not in LIBRARY
)


def _imported(path: Path) -> set[str]:
    """Top-level packages that the module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_domain_is_most_of_the_code() -> None:
    assert len(DOMAIN) > 100


@pytest.mark.parametrize("path", DOMAIN, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_domain_module_knows_no_transport(path: Path) -> None:
    assert not _imported(path) & TRANSPORTS
