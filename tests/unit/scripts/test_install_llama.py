"""Building llama.cpp for this CPU: the remedy for the compiler's mistake, and what makes a wheel another wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install_llama

HEADER = Path(install_llama.__file__).parent / "llama" / "amx_tile.h"
CONFIGURE_TILES = """
#include <immintrin.h>
struct tiles { unsigned char palette, start, zero[14]; unsigned short columns[16]; unsigned char rows[16]; };
void configure(void) {
    struct tiles tiles = {0};
    tiles.palette = 1;
    for (int i = 0; i < 8; ++i) { tiles.columns[i] = 64; tiles.rows[i] = 16; }
    _tile_loadconfig(&tiles);
}
"""
HEAD_BYTES = 17
"""All that GCC 12 leaves: the palette and the zeros it was going to write beside it."""


def stores_of(assembly: str) -> int:
    """Bytes that the function writes to its stack frame."""
    widths = {"movb": 1, "movw": 2, "movl": 4, "movq": 8, "movups": 16, "movaps": 16, "movdqa": 16, "vmovdqu": 32}
    written = 0
    for line in assembly.splitlines():
        parts = line.split()
        if len(parts) >= 2 and parts[0] in widths and parts[-1].endswith("(%rsp)"):
            written += widths[parts[0]]
    return written


def compiled(*arguments: str) -> str:
    compiler = shutil.which("gcc")
    assert compiler, "gcc builds llama.cpp; tests need it too"
    command = [compiler, "-O3", "-x", "c", "-S", "-o", "-", *arguments, "-"]
    return subprocess.run(command, input=CONFIGURE_TILES, capture_output=True, text=True, check=True).stdout


def test_with_the_header_every_store_of_the_tile_configuration_survives() -> None:
    """Palette, 16 bytes of column widths and 8 of row counts reach memory before the processor reads it."""
    assembly = compiled("-mamx-tile", "-include", str(HEADER))
    assert "ldtilecfg" in assembly
    assert stores_of(assembly) > HEAD_BYTES + 16


def test_the_header_is_needed_by_gcc_12() -> None:
    """Documents the defect; a compiler without it keeps the stores by itself."""
    bare, fixed = stores_of(compiled("-mamx-tile")), stores_of(compiled("-mamx-tile", "-include", str(HEADER)))
    assert bare == HEAD_BYTES or bare >= fixed


def test_the_header_changes_nothing_where_amx_is_off() -> None:
    source = "int main(void) { return 0; }"
    command = ["gcc", "-E", "-P", "-x", "c", "-"]
    plain = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    with_header = subprocess.run(
        [*command[:-1], "-include", str(HEADER), "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    assert with_header.split() == plain.split()


def test_the_build_without_amx_uses_all_else_that_the_cpu_has() -> None:
    options = install_llama.without_amx(frozenset({"avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"}))
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=ON", "-DGGML_AVX512_VNNI=ON", "-DGGML_AVX512_BF16=OFF"} <= set(options)
    assert not any("AMX" in option for option in options)


@pytest.mark.parametrize("what", ["cpu_features", "compiler_version"])
def test_another_cpu_or_compiler_makes_another_key(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    before = install_llama.build_key(install_llama.NATIVE)
    other = frozenset({"avx2"}) if what == "cpu_features" else "cc 99.0"
    monkeypatch.setattr(install_llama, what, lambda: other)
    assert install_llama.build_key(install_llama.NATIVE) != before


def test_a_portable_build_goes_on_where_one_ended_and_begins_anew_with_another_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No library is kept when anything changed that it depends on."""
    made: list[tuple[str, bool]] = []

    def build_kind(libraries: Path, kind: str, source: Path, build: Path, *, is_first: bool) -> None:
        if kind == "zen4" and not made[1:]:
            raise SystemExit("out of memory")
        made.append((kind, is_first))

    monkeypatch.setattr(install_llama, "build_kind", build_kind)
    monkeypatch.setattr(install_llama, "fetched_source", lambda scratch: scratch)
    monkeypatch.setattr(install_llama, "pip", lambda *arguments: None)
    monkeypatch.setenv("CMAKE_ARGS", "")
    with pytest.raises(SystemExit, match="memory"):
        install_llama.build_portable(tmp_path, ["x64", "zen4", "haswell"])
    install_llama.build_portable(tmp_path, ["x64", "haswell", "zen4"])
    assert made == [("x64", True), ("haswell", False), ("zen4", False)]
    monkeypatch.setattr(install_llama, "compiler_version", lambda: "cc 99.0")
    install_llama.build_portable(tmp_path, ["x64"])
    assert made[3:] == [("x64", True)]


@pytest.mark.parametrize("status", [1, 2, 23])
def test_any_status_of_pip_and_of_the_build_but_0_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    """R-108: no status of these programs is a success but 0; the message names it."""
    failing = tmp_path / "python"
    failing.write_text(f"#!/bin/sh\necho 'no compiler'\nexit {status}\n")
    failing.chmod(0o755)
    monkeypatch.setattr(install_llama.sys, "executable", str(failing))
    with pytest.raises(SystemExit, match=f"pip install x ended with {status}"):
        install_llama.pip("install", "x")
    with pytest.raises(SystemExit, match="no compiler"):
        install_llama.build_wheel(tmp_path, ())


@pytest.mark.parametrize(("compiler", "match"), [("no-such-compiler -m64", "is not found"), ("false", "ended with 1")])
def test_compiler_that_is_absent_or_broken_is_named(monkeypatch: pytest.MonkeyPatch, compiler: str, match: str) -> None:
    """R-108: before minutes of building."""
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(SystemExit, match=match):
        install_llama.compiler_version()


def test_the_installed_build_computes_many_rows_at_once() -> None:
    """The proof that the installer runs, on what is installed now."""
    script = HEADER.parent / "prove_decode.py"
    proof = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert proof.returncode == 0, proof.stderr
    assert "48 rows at once agree" in proof.stdout
