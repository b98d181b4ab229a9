"""Name maps: bijections between canonical, Hugging Face and GGUF names, for every architecture."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import TensorMismatch, UnsupportedArchitecture
from smeltkit.ml import names

ARCHITECTURES = sorted(names.TABLES)
rows = st.sampled_from([(architecture, row) for architecture in ARCHITECTURES for row in names.table_of(architecture)])
layers = st.integers(0, 99_999)


@given(rows, layers)
def test_every_name_comes_back_from_both_formats(entry: tuple[str, names.TensorRow], layer: int) -> None:
    """canonical -> HF -> canonical and canonical -> GGUF -> canonical change nothing, in any layer."""
    architecture, row = entry
    name = row.canonical.format(layer)
    assert names.hf_to_canonical(architecture, names.canonical_to_hf(architecture, name)) == name
    assert names.gguf_to_canonical(architecture, names.canonical_to_gguf(architecture, name)) == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("space", ["canonical", "hf", "gguf"])
def test_no_two_tensors_share_a_name(architecture: str, space: str) -> None:
    """Injective in each space, so the inverse is unique."""
    found = [getattr(row, space) for row in names.table_of(architecture)]
    assert len(set(found)) == len(found)


@given(st.sampled_from(ARCHITECTURES), st.text(max_size=60))
def test_no_other_text_is_a_name(architecture: str, text: str) -> None:
    """What the table does not hold is refused, whatever it looks like."""
    with pytest.raises(TensorMismatch):
        names.hf_to_canonical(architecture, text)


@pytest.mark.parametrize(
    "name", ["model.layers.{}.input_layernorm.weight", "model.layers.01.input_layernorm.weight", "model.layers.-1.mlp"]
)
def test_layer_placeholders_and_odd_numbers_are_no_names(name: str) -> None:
    """A name has one spelling."""
    with pytest.raises(TensorMismatch):
        names.hf_to_canonical("llama", name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_names_are_those_of_the_gguf_package(architecture: str) -> None:
    """Independent table: the package that llama.cpp's own converter uses."""
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(kind, 4)
    for row in names.table_of(architecture):
        stem, _, suffix = row.hf.format(3).rpartition(".")
        assert f"{table.get_name(stem)}.{suffix}" == row.gguf.format(3)


def test_unknown_architecture_lists_the_known() -> None:
    """The message is the remedy."""
    with pytest.raises(UnsupportedArchitecture, match="llama, qwen2, qwen3, phi3"):
        names.table_of("mamba")
