"""Something slower or weaker than asked for: announced, and refused in strict mode."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.inference.config import InferenceConfig
from services.inference.fallbacks import FEATURES, Fallback, Fallbacks, cpu_flags, of_build, of_kernels, of_weights
from services.inference.library import Library
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import SettingsDiffer

CPU = frozenset({"fpu", "avx", "avx2", "fma", "f16c", "bmi2", "amx_int8"})
BUILD = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AMX_INT8 = 1 | REPACK = 1 | "


def test_a_build_that_uses_what_the_cpu_has_is_no_fallback() -> None:
    assert of_build(CPU, BUILD) == []


@pytest.mark.parametrize("gone", ["AMX_INT8", "AVX2", "FMA"])
def test_a_build_without_instructions_that_the_cpu_has_is_one(gone: str) -> None:
    """R-011: such as the build without AMX that is installed where AMX fails its proof."""
    (found,) = of_build(CPU, BUILD.replace(f"{gone} = 1", f"{gone} = 0"))
    assert found.requested == f"llama.cpp with {gone}"
    assert "make install" in found.cause


def test_narrower_instructions_than_the_build_uses_are_no_fallback() -> None:
    """R-011: where vectors of 512 bits are used, as the libraries for servers do, those of 256 are not missed."""
    wide = BUILD + "AVX512 = 1 | AVX512_VNNI = 1 | "
    assert of_build(CPU | {"avx_vnni", "avx512f", "avx512_vnni"}, wide) == []
    (found,) = of_build(CPU | {"avx_vnni"}, BUILD)
    assert found.requested == "llama.cpp with AVX_VNNI"


@pytest.mark.parametrize("is_wanted", [True, False])
@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("cpu", [CPU, CPU | {"avx512_vnni"}])
def test_missing_kernels_are_said_where_the_cpu_has_their_instructions(
    cpu: frozenset[str], is_used: bool, is_wanted: bool
) -> None:
    """Who switched them off, and whose CPU could not run them, is not bothered."""
    found = of_kernels(cpu, is_wanted=is_wanted, is_used=is_used)
    assert bool(found) == (is_wanted and not is_used and "avx512_vnni" in cpu)


def test_weights_that_run_in_another_type_are_one() -> None:
    """R-011: bfloat16 weights that are computed in half precision."""
    (found,) = of_weights("BF16", "F16")
    assert (found.requested, found.effective) == ("weights in BF16", "weights in F16")
    assert of_weights("Q8_0", "Q8_0") == []


def test_a_fallback_is_announced_and_in_strict_mode_refused() -> None:
    """R-011: an error is raised before anything is announced as used."""
    told: list[Fallback] = []
    Fallbacks(told.append).report(of_weights("BF16", "F16"))
    assert told == of_weights("BF16", "F16")
    strict = Fallbacks(told.append, is_strict=True)
    strict.report([])
    with pytest.raises(SettingsDiffer, match="weights in F16 instead of weights in BF16.*strict mode"):
        strict.report(of_weights("BF16", "F16"))
    assert len(told) == 1


async def test_a_strict_replica_loads_no_bundle_that_would_run_in_another_type(tmp_path: Path) -> None:
    """R-011: refused before a byte of it is fetched."""
    settings = InferenceConfig(cache_dir=tmp_path / "cache")
    library = Library(LocalStore(tmp_path / "store"), settings, Fallbacks(is_strict=True))
    described = SimpleNamespace(bundle=SimpleNamespace(scheme="BF16"), scheme="F16")
    with pytest.raises(SettingsDiffer, match="SMELT_INFERENCE_STRICT"):
        await library.load(cast(Any, described))


def test_the_flags_of_this_cpu_are_found(tmp_path: Path) -> None:
    """R-011: by the names that the table knows."""
    assert cpu_flags() & set(FEATURES)
    assert cpu_flags(tmp_path / "none") == frozenset()
