"""Texts rearranged for filling in the middle: what stands before and after a place comes first, then what stands there.

    PREFIX before SUFFIX after MIDDLE between         the usual order (PSM)
    PREFIX SUFFIX after MIDDLE before between         the suffix first (SPM), with the same markers

Bavarian et al. (arXiv:2207.14255), whole rows cut between characters; the draw hangs on the seed and the row's number
alone. Markers are the tokenizer's own, each a single added token: one that is spelt in several would teach what no
editor asks for.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from services.trainer.settings.training import FimSettings
from smeltkit.errors import BadConfig, BadDataset
from smeltkit.ml.tokenizer import Tokenizer

MARKERS: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
"""Prefix, suffix and middle as tokenizers write them: Qwen's, StarCoder's, SantaCoder's."""


class Infill:
    """Rearranges texts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, settings: FimSettings, seed: int) -> None:
        """BadConfig if the tokenizer has no markers, or one of them is not a single token."""
        self._tokenizer, self._settings, self._seed = tokenizer, settings, seed
        self._texts, self._markers = _markers(tokenizer, settings.share)

    def ids(self, text: str, number: int, where: str) -> list[int] | None:
        """The ids of row `number` rearranged, None if it stays as it is; BadDataset if it holds a marker itself."""
        draw = np.random.Generator(np.random.PCG64((self._seed, number)))
        chosen, order = draw.random(2)
        begin, end = sorted(draw.integers(0, len(text) + 1, 2).tolist())
        if chosen >= self._settings.share:
            return None
        if held := [marker for marker in self._texts if marker in text]:
            raise BadDataset(f"{where} holds the marker {held[0]}, so it cannot be rearranged; remove it from the text")
        before, between, after = map(self._tokenizer.encode, (text[:begin], text[begin:end], text[end:]))
        prefix, suffix, middle = self._markers
        if order < self._settings.suffix_first:
            return [prefix, suffix, *after, middle, *before, *between]
        return [prefix, *before, suffix, *after, middle, *between]


def _markers(tokenizer: Tokenizer, share: float) -> tuple[tuple[str, ...], list[int]]:
    """The texts and ids of prefix, suffix and middle."""
    for texts in MARKERS:
        if tokenizer.token_id(texts[0]) is None:
            continue
        spelt = [tokenizer.encode(text) for text in texts]
        for text, ids in zip(texts, spelt, strict=True):
            if len(ids) != 1 or not tokenizer.is_added(ids[0]):
                raise BadConfig(
                    f"fim.share={share:g} needs markers of one token each, but this tokenizer spells {text} in"
                    f" {len(ids)}; set fim.share to 0, or choose a base that knows them"
                )
        return texts, [ids[0] for ids in spelt]
    known = ", ".join(texts[0] for texts in MARKERS)
    raise BadConfig(
        f"fim.share={share:g} needs a tokenizer with markers for filling in the middle ({known}); this one has none."
        " Set fim.share to 0, or choose a base that knows them"
    )
