"""How long completions take, measured as they come: time-outs follow from it and from the tokens allowed (R-039)."""

from __future__ import annotations

from smeltkit import limits


class Pace:
    """The slowest completion so far, in seconds a token; of one evaluation on one engine."""

    def __init__(self) -> None:
        self.token_s = 0.0
        """Seconds a token of the slowest completion, waiting and prompt included; 0 before there is one."""

    def add(self, tokens: int, seconds: float) -> None:
        """Takes a completion of `tokens` that took `seconds`; short ones say more of their prompt than of the pace."""
        if tokens >= limits.EVALUATION_PACE_TOKENS_MIN:
            self.token_s = max(self.token_s, seconds / tokens)

    def timeout_s(self, max_tokens: int) -> float:
        """Seconds that a completion of up to `max_tokens` may take: what it takes at the pace measured, times over."""
        token_s = self.token_s * limits.EVALUATION_PACE_FACTOR or limits.EVALUATION_TOKEN_S
        return limits.EVALUATION_FIRST_TOKEN_S + token_s * max_tokens
