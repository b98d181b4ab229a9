"""Starts the real sandbox service for tests, and builds candidates from the published benchmarks."""

from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from smelt.sandbox.v1 import sandbox_pb2 as pb
from smelt.sandbox.v1 import sandbox_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60
TOGETHER = 16
DATA = {
    "HumanEval.jsonl.gz": (
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
    ),
    "mbpp.jsonl": (
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
        "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
    ),
}


@dataclass(frozen=True)
class Service:
    """A running sandbox service."""

    pid: int
    address: str
    stub: sandbox_pb2_grpc.SandboxServiceStub


@contextlib.contextmanager
def packages_folder(*names: str) -> Iterator[str]:
    """A folder with the installed packages `names`, where a jail can show it: not in /tmp, as a checkout may be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="smelt-packages-") as folder:
        os.chmod(folder, 0o755)
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if entry.is_dir() and entry.name.partition(".")[0] in names:
                shutil.copytree(entry, Path(folder, entry.name))
        yield folder


@contextlib.contextmanager
def sandbox_service(*, command: Sequence[str] = (), **environment: str) -> Iterator[Service]:
    """The service on a free port, ready; settings without their prefix, e.g. slots="1". `command` may start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {f"SMELT_SANDBOX_{name.upper()}": value for name, value in environment.items()}
    process = subprocess.Popen(
        [*command] or [sys.executable, "-m", "services.sandbox"],
        cwd=REPOSITORY,
        env={**os.environ, "SMELT_RPC_LISTEN": address, **settings},
    )
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)
            yield Service(process.pid, address, sandbox_pb2_grpc.SandboxServiceStub(channel))
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT_S)
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    """Pids of the process's children, whichever thread started them."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def humaneval_references() -> dict[str, pb.Candidate]:
    """Task id to the reference solution as a candidate: the prompt's other functions are the preamble."""
    return {row["task_id"]: _humaneval_candidate(row, row["canonical_solution"]) for row in read_humaneval()}


def read_humaneval() -> list[dict[str, str]]:
    """The published problems."""
    return [json.loads(line) for line in gzip.decompress(_data("HumanEval.jsonl.gz")).decode().splitlines()]


def mbpp_references() -> dict[str, pb.Candidate]:
    """Task id to the reference solution of MBPP's test split; setup runs after the solution is loaded."""
    rows = [json.loads(line) for line in _data("mbpp.jsonl").decode().splitlines()]
    return {f"Mbpp/{row['task_id']}": _mbpp_candidate(row) for row in rows if 11 <= row["task_id"] <= 510}


def judge_all(
    stub: sandbox_pb2_grpc.SandboxServiceStub, candidates: dict[str, pb.Candidate], *, timeout_s: float
) -> dict[str, pb.Record]:
    """Id to record of every candidate, in one stream of messages with several each; none may be refused."""
    answers = answers_to(stub, candidates, timeout_s=timeout_s)
    refused = {id: one.refusal.message for id, one in answers.items() if one.HasField("refusal")}
    assert not refused, refused
    return {id: one.record for id, one in answers.items()}


def answers_to(
    stub: sandbox_pb2_grpc.SandboxServiceStub, candidates: dict[str, pb.Candidate], *, timeout_s: float
) -> dict[str, pb.JudgeBatchResponse | pb.BatchRecord]:
    """Id to record or refusal of every candidate, in order of completion."""
    answers = stub.JudgeBatch(_in_groups(candidates), timeout=timeout_s)
    return {one.id: one for answer in answers for one in (answer, *answer.more)}


def _in_groups(candidates: dict[str, pb.Candidate]) -> Iterator[pb.JudgeBatchRequest]:
    items = iter(candidates.items())
    for name, candidate in items:
        more = [pb.BatchCandidate(id=id, candidate=one) for id, one in itertools.islice(items, TOGETHER - 1)]
        yield pb.JudgeBatchRequest(id=name, candidate=candidate, more=more)


def _humaneval_candidate(row: dict[str, str], completion: str) -> pb.Candidate:
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    others = [node for node in tree.body if getattr(node, "name", "") != row["entry_point"]]
    return pb.Candidate(
        code=(row["prompt"] + completion).encode(),
        form=pb.FORM_CHECK,
        tests=row["test"],
        preamble="\n".join(map(ast.unparse, others)),
        entry_point=row["entry_point"],
        seed=row["task_id"],
    )


def _mbpp_candidate(row: dict[str, object]) -> pb.Candidate:
    assert isinstance(row["test_list"], list)
    tests, setup = "\n".join(row["test_list"]), str(row["test_setup_code"])
    read = {node.id for node in ast.walk(ast.parse(f"{setup}\n{tests}")) if isinstance(node, ast.Name)}
    bound = compile(str(row["code"]), "reference", "exec").co_names
    return pb.Candidate(
        code=str(row["code"]).encode(),
        form=pb.FORM_ASSERTS,
        tests=tests,
        setup=setup,
        exports=sorted(read & _bound_at_top_level(str(row["code"])) & set(bound)),
        seed=str(row["task_id"]),
        limits=pb.Limits(cpu_s=20, wall_s=300),
    )


def _bound_at_top_level(code: str) -> set[str]:
    bound: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        else:
            names = (inner for inner in ast.walk(node) if isinstance(inner, ast.Name))
            bound.update(inner.id for inner in names if isinstance(inner.ctx, ast.Store))
    return bound


def _data(name: str) -> bytes:
    """The published file: beside the repository where it is kept, else from its home; digest checked."""
    digest, address = DATA[name]
    beside = REPOSITORY.parent / "shared" / "data" / name
    content = beside.read_bytes() if beside.exists() else urllib.request.urlopen(address, timeout=60).read()
    assert hashlib.sha256(content).hexdigest() == digest, f"{name} is not the published file"
    return bytes(content)
