"""llama.cpp's own server and batch benchmark, built from the sources inside the llama-cpp-python package we pin.

Same revision, same compiler, native CPU flags; static, without web page, TLS or download. Built once into the cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from scripts.install_llama import VERSION, compiler_version, cpu_features
from smeltkit.servers import free_ports

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_CCACHE=OFF",
)
TARGETS = ("llama-server", "llama-batched-bench")
HEADER = Path(__file__).resolve().parents[2] / "scripts" / "llama" / "amx_tile.h"
START_TIMEOUT_S = 120.0


def build() -> Path:
    """The folder with the built TARGETS; about eight minutes on 2 cores the first time."""
    key = hashlib.sha256(repr((VERSION, OPTIONS, compiler_version(), sorted(cpu_features()))).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smelt")
    folder = cache / f"llama-server-{VERSION}-{key[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = _compile(Path(scratch))
            target = Path(scratch, "new")
            target.mkdir()
            for name in TARGETS:
                shutil.copy(built / "bin" / name, target)
            target.rename(folder)
    return folder


def _compile(scratch: Path) -> Path:
    print(f"building llama-server of llama-cpp-python {VERSION}, once; about 8 minutes on 2 cores", flush=True)
    package = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-build-isolation",
        "-d",
        str(scratch),
        *package,
    ]
    subprocess.run(download, check=False, capture_output=True)
    with tarfile.open(next(scratch.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    source = next(scratch.glob("llama_cpp_python-*/vendor/llama.cpp"))
    flags = [f"-DCMAKE_{language}_FLAGS=-include {HEADER}" for language in ("C", "CXX")]
    subprocess.run(["cmake", "-S", source, "-B", scratch / "build", *OPTIONS, *flags], check=True, capture_output=True)
    command = ["cmake", "--build", scratch / "build", "--parallel", str(os.cpu_count()), "--target", *TARGETS]
    subprocess.run(command, check=True, capture_output=True)
    return scratch / "build"


@asynccontextmanager
async def llama_server(
    model: Path, *, slots: int, context_tokens: int, threads: int
) -> AsyncIterator[httpx.AsyncClient]:
    """A running llama-server, as a client of it. Cells of a slot's own, as our service has them for such a model."""
    port = free_ports(1)[0]
    arguments = [
        "--model", model, "--port", port, "--parallel", slots, "--ctx-size", slots * context_tokens,
        "--threads", threads, "--threads-batch", threads, "--no-kv-unified", "--cache-ram", 0, "--no-slots",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        build() / "llama-server",
        *map(str, arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=0)  # it closes idle ones when it likes
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
        try:
            await _wait_healthy(client)
            yield client
        finally:
            process.terminate()
            await process.wait()


async def complete(client: httpx.AsyncClient, ids: list[int], max_tokens: int, *, is_streamed: bool) -> int:
    """Tokens generated after the prompt `ids`. Its cheapest way to be greedy: top-k 1 and no other sampler."""
    body = {
        "prompt": ids,
        "n_predict": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "top_k": 1,
        "samplers": ["top_k"],
        "stream": is_streamed,
    }
    if not is_streamed:
        reply = await client.post("/completion", json=body)
        return int(reply.raise_for_status().json()["tokens_predicted"])
    event = ""
    async with client.stream("POST", "/completion", json=body) as reply:
        async for line in reply.raise_for_status().aiter_lines():
            event = line or event
    return int(json.loads(event.removeprefix("data: "))["tokens_predicted"])


def batched_bench(model: Path, *, rows: int, prompt_tokens: int, new_tokens: int, threads: int) -> dict[str, float]:
    """Tokens per second that the bare library reaches: `prompt`, `one_row` and `rows` at once."""
    command = [
        build() / "llama-batched-bench", "-m", model, "-c", rows * (prompt_tokens + new_tokens), "-b", 512, "-ub", 512,
        "-npp", prompt_tokens, "-ntg", new_tokens, "-npl", f"1,{rows}", "-t", threads, "-tb", threads,
    ]  # fmt: skip
    output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    table = [re.findall(r"[\d.]+", line) for line in output.splitlines() if re.match(r"\|\s*\d", line)]
    speeds = {int(row[2]): (float(row[5]), float(row[7])) for row in table}
    return {"prompt": speeds[1][0], "one_row": speeds[1][1], "rows": speeds[rows][1]}


async def _wait_healthy(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError(f"llama-server is not healthy after {START_TIMEOUT_S:.0f} s")
