"""What somebody who wrote an unknown word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def meant(word: object, known: Sequence[str], before: str = "") -> str:
    """`did you mean X?` of the nearest of `known`, with `before` in front of it; else what is known, in its order."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {before}{near[0]}?" if near else f"known are {', '.join(known)}"
