"""Builds llama-cpp-python for this machine's CPU, once, and installs it into the Python that runs this script.

    .venv/bin/python scripts/install_llama.py
    python scripts/install_llama.py --portable FOLDER [KIND ...]   # for images: only builds, for kinds of x86 CPUs

The wheel is cached under `$XDG_CACHE_HOME/smelt/wheels` (default `~/.cache`) by version, options, CPU features,
compiler and Python: a wheel built for one CPU may crash on another. After installing, a process of its own proves
that a batch of many rows decodes (`llama/prove_decode.py`); if it does not, a build without AMX is tried, and if that
fails too the script ends with status 1. Sources come unmodified from the package registry; `llama/options.cmake`
holds our settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "0.3.36"
HERE = Path(__file__).resolve().parent
PROGRESS_PERIOD_S = 4.0
TAIL_LINES = 40
OPTIONS = (
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_CCACHE=OFF",
)
NATIVE = ("-DGGML_NATIVE=ON",)
# For images: a library for each kind of x86 CPU; a process takes the best that its CPU runs, by upstream's own score.
PORTABLE = (
    "-GNinja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)
_AVX2 = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2")
KINDS = {
    "x64": (),
    "sse42": ("SSE42",),
    "haswell": _AVX2,
    "alderlake": (*_AVX2, "AVX_VNNI"),
    "skylakex": (*_AVX2, "AVX512"),
    "cascadelake": (*_AVX2, "AVX512", "AVX512_VNNI"),
    "icelake": (*_AVX2, "AVX512", "AVX512_VNNI", "AVX512_VBMI"),
    "zen4": (*_AVX2, "AVX512", "AVX512_VNNI", "AVX512_VBMI", "AVX512_BF16"),
    "sapphirerapids": (*_AVX2, "AVX512", "AVX512_VNNI", "AVX512_VBMI", "AVX512_BF16", "AMX_TILE", "AMX_INT8"),
}
_SWITCHES = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2", "AVX_VNNI", "AVX512", "AVX512_VNNI", "AVX512_VBMI")
_SWITCHES += ("AVX512_BF16", "AMX_TILE", "AMX_INT8", "AMX_BF16")
# CPU flag as Linux names it -> ggml's option; what a build without AMX switches on by hand.
FEATURES = {
    "avx": "GGML_AVX",
    "avx2": "GGML_AVX2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2",
    "avx_vnni": "GGML_AVX_VNNI",
    "avx512f": "GGML_AVX512",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_vbmi": "GGML_AVX512_VBMI",
    "avx512_bf16": "GGML_AVX512_BF16",
}


def main() -> int:
    """Exit status: 0 when a build that passed the proof is installed, or the portable one lies in its folder."""
    if sys.argv[1:2] == ["--portable"]:
        build_portable(Path(sys.argv[2]), sys.argv[3:] or list(KINDS))
        return 0
    record = Path(sys.prefix, "smelt-llama.json")
    builds = {"native": NATIVE, "AMX-free": without_amx(cpu_features())}
    if record.exists() and record.read_text() in map(build_key, builds.values()) and is_installed():
        print(f"llama-cpp-python {VERSION} is installed, built for this CPU")
        return 0
    for name, options in builds.items():
        key = build_key(options)
        install(cached_wheel(key, options))
        proof = subprocess.run([sys.executable, str(HERE / "llama/prove_decode.py")], capture_output=True, text=True)
        if proof.returncode == 0:
            record.write_text(key)
            print(proof.stdout.strip())
            return 0
        cause = proof.stderr.strip()[-400:] or f"exit status {proof.returncode}"
        print(f"the {name} build of llama.cpp fails at a batch of many rows: {cause}", file=sys.stderr)
    print(
        f"No build of llama.cpp works with {compiler_version()}. Install another compiler (GCC 13 or later, or clang),"
        " set CC and CXX to it, and run this again.",
        file=sys.stderr,
    )
    return 1


def install(wheel: Path) -> None:
    """Installs `wheel`, whatever was there, and what it requires, pinned where the repository pins it."""
    pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel))
    pip("install", "--quiet", *pinned("--constraint"), str(wheel))


def cached_wheel(key: str, options: tuple[str, ...]) -> Path:
    """The wheel built with `options`, from the cache or fresh; one process at a time builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smelt", "wheels")
    folder = cache / f"llama-{VERSION}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                build_wheel(Path(scratch, "new"), options)
                Path(scratch, "new", "build.json").write_text(key)
                shutil.move(Path(scratch, "new"), folder)
    return next(folder.glob("*.whl"))


def build_wheel(folder: Path, options: tuple[str, ...]) -> None:
    """Compiles upstream's source package into a wheel in `folder`; a progress line every few seconds."""
    settings = (*OPTIONS, *options, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={HERE / 'llama/options.cmake'}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--verbose",
        "--no-deps",
        "--no-cache-dir",
        "--no-binary",
        "llama-cpp-python",
        "--wheel-dir",
        str(folder),
        *pinned("--build-constraint"),
        f"llama-cpp-python=={VERSION}",
    ]
    environment = {**os.environ, "CMAKE_ARGS": shlex.join(settings)}
    print(f"building llama-cpp-python {VERSION} for this CPU, once; about 4 minutes on 2 cores", flush=True)
    started = shown = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as build:
        for line in build.stdout or ():
            tail.append(line)
            step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if step and time.monotonic() - shown >= PROGRESS_PERIOD_S:
                shown = time.monotonic()
                print(f"  {step[1]} of {step[2]} steps, {shown - started:.0f} s", flush=True)
    if build.returncode != 0:
        raise SystemExit("".join(tail) + "the build failed; the lines above say why. It needs a C++17 compiler")
    print(f"  built in {time.monotonic() - started:.0f} s", flush=True)


def build_portable(folder: Path, kinds: list[str]) -> None:
    """A wheel without libraries in `folder`, and all libraries in `folder`/lib. Needs cmake, ninja and a compiler.

    What an earlier run left there is kept as far as nothing that it depends on changed, whatever CPU it was built on.
    """
    libraries, record = folder / "lib", folder / "built.json"
    libraries.mkdir(parents=True, exist_ok=True)
    key = build_key(PORTABLE, features=frozenset())
    built = json.loads(record.read_text()) if record.exists() else {}
    missing = [kind for kind in kinds if built.get(kind) != key]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = fetched_source(Path(scratch))
        os.environ["CMAKE_ARGS"] = "-DLLAMA_BUILD=OFF"
        pip("wheel", "--no-deps", "--wheel-dir", str(folder), *pinned("--build-constraint"), str(source))
        for kind in missing:
            build_kind(libraries, kind, source, Path(scratch, "build"), is_first=key not in built.values())
            built[kind] = key
            record.write_text(json.dumps(built, indent=1))


def build_kind(libraries: Path, kind: str, source: Path, build: Path, *, is_first: bool) -> None:
    """The library for one kind of CPU; with the first, what all kinds share. `build` may hold another kind's build."""
    switches = [f"-DGGML_{name}={'ON' if name in KINDS[kind] else 'OFF'}" for name in _SWITCHES]
    settings = f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={HERE / 'llama/options.cmake'}"
    where = ("-S", str(source / "vendor/llama.cpp"), "-B", str(build))
    run("cmake", *where, *PORTABLE, *OPTIONS, *switches, settings)
    run("cmake", "--build", str(build), "--target", *(["llama"] if is_first else []), "ggml-cpu")
    if is_first:
        for name in ("llama", "ggml", "ggml-base"):
            found = build / "bin" / f"lib{name}.so"
            soname = f"{found.name}.{found.resolve().name.split('.so.')[1].split('.')[0]}"
            shutil.copy(found.resolve(), libraries / soname)
            (libraries / found.name).unlink(missing_ok=True)
            (libraries / found.name).symlink_to(soname)
    shutil.copy((build / "bin/libggml-cpu.so").resolve(), libraries / f"libggml-cpu-{kind}.so")


def fetched_source(scratch: Path) -> Path:
    """Upstream's source package, unpacked."""
    only_source = ("--no-deps", "--no-binary", "llama-cpp-python", *pinned("--build-constraint"))
    pip("download", "--quiet", *only_source, "--dest", str(scratch), f"llama-cpp-python=={VERSION}")
    (archive,) = scratch.glob("*.tar.gz")
    shutil.unpack_archive(archive, scratch / "source")
    (source,) = (scratch / "source").iterdir()
    return source


def run(*command: str) -> None:
    """Runs a program; SystemExit if it fails."""
    if status := subprocess.run(command).returncode:
        raise SystemExit(f"{shlex.join(command[:3])} ended with {status}; its message above says why")


def pinned(option: str) -> tuple[str, ...]:
    """pip's `option` with the repository's pins; nothing where the script stands alone."""
    constraints = HERE.parent / "constraints.txt"
    return (option, str(constraints)) if constraints.exists() else ()


def build_key(options: tuple[str, ...], *, features: frozenset[str] | None = None) -> str:
    """Everything that a build depends on, as JSON text; `features` of the CPU are this one's unless given."""
    ours = "".join(path.read_text() for path in sorted((HERE / "llama").glob("*.[ch]*")))
    return json.dumps(
        {
            "version": VERSION,
            "options": [*OPTIONS, *options],
            "cpu": sorted(cpu_features() if features is None else features),
            "compiler": compiler_version(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "settings": hashlib.sha256(ours.encode()).hexdigest(),
        },
        indent=1,
    )


def cpu_features() -> frozenset[str]:
    """Instruction-set flags of this CPU, as Linux names them."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    wanted = re.compile(r"avx|amx|fma|f16c|bmi|sse|asimd|sve|i8mm|bf16|dotprod|fphp")
    return frozenset(flag for flag in (flags[1].split() if flags else ()) if wanted.search(flag))


def without_amx(features: frozenset[str]) -> tuple[str, ...]:
    """Options of a build that uses what this CPU has, except AMX."""
    return (
        "-DGGML_NATIVE=OFF",
        *(f"-D{option}={'ON' if flag in features else 'OFF'}" for flag, option in FEATURES.items()),
    )


def compiler_version() -> str:
    """First line of the C++ compiler's `--version`; SystemExit if there is none, or it does not work."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise SystemExit(f"no C++ compiler: {compiler[0]} is not found; install one (Debian: apt install g++)")
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if told.returncode or not told.stdout:
        raise SystemExit(
            f"`{shlex.join(compiler)} --version` ended with {told.returncode}: {told.stderr.strip()[-400:]}"
        )
    return told.stdout.splitlines()[0]


def is_installed() -> bool:
    """Whether this Python has the package in the version wanted."""
    script = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == VERSION


def pip(*arguments: str) -> None:
    """Runs pip of this Python; SystemExit if it fails."""
    status = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]).returncode
    if status:
        raise SystemExit(f"pip {' '.join(arguments)} ended with {status}; its message above says why")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; another process waits, however long a build takes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
