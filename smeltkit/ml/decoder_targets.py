"""What a target can be beside a token id; known to data that is prepared without torch."""

from __future__ import annotations

from typing import Final

IGNORED: Final = -100
"""Target of a token that takes no part in the loss."""
