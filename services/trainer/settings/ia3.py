"""Which layers carry a learnt vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Ia3Settings:
    """Vectors that scale what layers compute with, see `adapters.ia3`; only with method ia3."""

    key: ClassVar = "ia3"
    targets: tuple[str, ...] = ("attn.k", "attn.v", "mlp.down")
    """Linear layers of every block; of mlp.down the inputs are scaled, of any other the outputs."""
