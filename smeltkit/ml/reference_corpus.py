"""Texts on which two tokenizers must agree, id for id, before one may stand for the other.

Code first, then what breaks tokenizers: tabs, carriage returns, runs of blanks and digits, contractions, combining
marks, scripts without spaces, emoji. All in Unicode's NFC form, because llama.cpp does not normalize.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

_TEXTS = (
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    'class Point:\n\t"""Tabs\tand\tmore."""\n\n\tdef __init__(self, x=0.5):\n\t\tself.x = x  # note\n',
    "for i in range(10):\r\n    if i % 2 == 0 and not i != 4:\r\n        print(f'{i:>08.3f}', end='')\r\n",
    "x = {'a': [1, 22, 333, 4444, 55555], \"b\": (0x1F, 1e-9, 3.14159265358979)}\n\n\n\nlambda s: s[::-1]",
    "@decorator\nasync def f(*args, **kw):\n        await g()\n   \n  # 3 blanks above\nreturn~x<<2 | ~y&1 ^"
    " 7 // 3 ** 2",
    "import os.path as p; assert p.join('a', 'b') == r'a\\b' or True  # noqa: E702",
    "  leading blanks, trailing blanks    ",
    "\n\n \n  \n\t\n", "a", " ", "\t", "\n", "    ", "?", "0", "",
    "I'm sure they'll say we've won; it's HE'S and DON'T, o'clock. 'quoted' ''empty''",
    "1234567890 12 345 6,789.01 3.3 3..3 3...3 -42 +7 1_000_000 2026-11-21T09:00:00Z",
    "------======= ......!!!!!!?????? <<<>>> |||&&& ``` $$$ %%% ### @@@ ~~~ ^^^",
    "Gr\u00fc\u00dfe aus K\u00f6ln, na\u00efve caf\u00e9, \u00c5ngstr\u00f6m, \u0141\u00f3d\u017a, \u0130stanbul",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \u30c6\u30b9\u30c8"
    " \uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947"
    " \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (joined) \u2705 \U0001f999\U0001f999 \u2192 \u221e"
    " \u00bd \u00b2",
    "mixed\u3042abc\u4e2d1\u65872def_\u00e9t\u00e9 CamelCaseHTTPServer snake_case SCREAMING_CASE kebab-case",
    "SELECT * FROM t WHERE a>=1 AND b<>'x';\n<div class=\"c\">&nbsp;</div>\n{\"k\": null, \"v\": [true, -0.0]}",
)  # fmt: skip


def texts(special: Iterable[str] = ()) -> Sequence[str]:
    """The corpus; with `special` tokens of a vocabulary, each also amid text as chat templates write them."""
    amid = [
        text
        for token in special
        for text in (token, f"{token}user\nHi there{token}\n", f"a{token}b", f"x = 1 {token} y\n\n{token}\n\tz")
    ]
    return [unicodedata.normalize("NFC", text) for text in (*_TEXTS, *amid)]
