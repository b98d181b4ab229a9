"""Token ids as llama.cpp's own vocabulary gives them, asked in a fresh process.

`python -m smeltkit.ml.llama_vocab FILE.gguf` reads a JSON list of texts from standard input and writes a JSON list of
id lists. A process of its own, because llama.cpp answers some foreign vocabularies with an abort instead of an error.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadTokenizer, Timeout
from smeltkit.exits import REFUSED, check_exit


def encode(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text under the vocabulary in a GGUF file (tensors are not needed), special tokens recognised.

    BadTokenizer if llama.cpp refuses the vocabulary; Timeout after VOCABULARY_CHECK_TIMEOUT_S.
    """
    command = [sys.executable, "-m", "smeltkit.ml.llama_vocab", str(path)]
    try:
        done = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, timeout=limits.VOCABULARY_CHECK_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise Timeout(f"llama.cpp needed more than {limits.VOCABULARY_CHECK_TIMEOUT_S:g} s for a vocabulary") from error
    program = "llama.cpp's reader of the vocabulary made from tokenizer.json"
    check_exit(program, done.returncode, {REFUSED: BadTokenizer}, done.stderr)
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def main(path: str) -> None:
    """Body of the process."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        sys.stderr.write("it could not be loaded\n")
        sys.exit(REFUSED)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    result = []
    for text in json.load(sys.stdin):
        data = text.encode()
        count = -llama_cpp.llama_tokenize(vocabulary, data, len(data), None, 0, False, True)
        buffer = (ctypes.c_int32 * count)()
        llama_cpp.llama_tokenize(vocabulary, data, len(data), buffer, count, False, True)
        result.append(list(buffer))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
