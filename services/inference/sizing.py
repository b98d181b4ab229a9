"""How much a model needs, known from its description before a byte is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from services.inference.config import InferenceConfig
from smeltkit.errors import OutOfMemory
from smeltkit.ml.arch import ModelConfig

FLOAT_BYTES = 4
CELLS_MIN = 256
LOGITS_BYTES = 32 * 1024**2
"""Bytes that the logits of a step may take; slots that need more get it."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What one model gets."""

    cells: int
    """Tokens that its key-value memory holds."""
    is_split: bool
    """Whether every slot has cells of its own for a whole context, else all slots share them."""
    output_rows: int
    """Rows of a step whose logits can be asked for; a text is scored in pieces of so many."""
    memory_bytes: int
    """Weights, key-value memory and working buffers together."""


def size_model(config: ModelConfig, weights_bytes: int, settings: InferenceConfig) -> Sizing:
    """The sizing of a model whose weights take `weights_bytes`: cells for all slots, as far as `kv_bytes` goes.

    Cells of a slot's own are twice as fast with many slots: attention reads no others. Shared ones let a few
    long sequences use what many short ones would. OutOfMemory if `kv_bytes` holds too few tokens to be of any use.
    """
    token_bytes = config.kv_bytes_per_token()
    wanted = settings.slots * -(-config.context_tokens // CELLS_MIN) * CELLS_MIN
    cells = min(wanted, settings.kv_bytes // token_bytes)
    if cells < min(CELLS_MIN, config.context_tokens):
        raise OutOfMemory(
            f"SMELT_INFERENCE_KV_BYTES={settings.kv_bytes} holds {cells} tokens of {token_bytes} bytes; "
            f"give at least {CELLS_MIN * token_bytes}"
        )
    logits_bytes = FLOAT_BYTES * config.vocab_size
    output_rows = max(settings.slots, min(settings.batch_rows, LOGITS_BYTES // logits_bytes))
    widest = max(4 * config.hidden_size, 3 * config.intermediate_size)
    buffers = FLOAT_BYTES * settings.batch_rows * widest + 2 * output_rows * logits_bytes
    memory_bytes = weights_bytes + cells * token_bytes + buffers
    return Sizing(cells=cells, is_split=cells == wanted, output_rows=output_rows, memory_bytes=memory_bytes)
