"""Proves that the installed llama.cpp computes products of many rows: exits 0 and says what it is, else dies or says
why.

Run in a process of its own: a miscompiled build ends with a signal at the first batch of more than one row. A random
one-layer Q8_0 model (the type that every special kernel takes) is written to a temporary folder; the last row of a
batch of 48 must give the logits that the same tokens give one at a time. Of a build for many kinds of CPU the best
library for this one computes, or the one that is named: `prove_decode.py libggml-cpu-haswell.so`.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import llama_cpp
import numpy as np

VOCAB, WIDTH, HEADS, ROWS = 512, 256, 4, 48
F32, Q8_0 = 0, 8
UINT32, FLOAT32, STRING = 4, 6, 8
ALIGNMENT = 32
TOLERANCE = 0.05  # of the largest logit: kernels differ in how they round activations, a wrong kernel differs by all


def main() -> int:
    """Exit status: 0 when both ways agree."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    load_library(*sys.argv[1:])
    tokens = np.random.default_rng(1).integers(0, VOCAB, ROWS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.gguf")
        write_random_model(path)
        own = [last_logits(path, tokens, count) for count in (ROWS, 1) if use_row_kernels(True)]
        use_row_kernels(False)
        batched, single = last_logits(path, tokens, ROWS), last_logits(path, tokens, 1)
    difference = max(float(np.abs(logits - single).max() / np.abs(single).max()) for logits in (batched, *own))
    if not difference < TOLERANCE:
        print(
            f"a batch of {ROWS} rows differs from single rows by {difference:.3f} of the largest logit", file=sys.stderr
        )
        return 1
    print(
        f"llama.cpp works on this machine (llama-cpp-python {llama_cpp.__version__}): {ROWS} rows at once agree with "
        f"single rows to {difference:.2%}, {'with and without our kernels' if own else 'with its own kernels'}; "
        f"it uses {features()}"
    )
    return 0


def load_library(name: str = "") -> None:
    """Loads what computes, where that is not linked in; SystemExit if this CPU cannot run the library `name`."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    registry = ctypes.CDLL(str(folder / "libggml.so"))
    registry.ggml_backend_load.restype = ctypes.c_void_p
    if name and not registry.ggml_backend_load(str(folder / name).encode()):
        raise SystemExit(f"{name} does not run on this CPU")
    if registry.ggml_backend_reg_count() == 0:
        registry.ggml_backend_load_all_from_path(str(folder).encode())


def use_row_kernels(is_wanted: bool) -> bool:
    """Whether models that are loaded from now on take `row_kernels.cpp`: as wanted, where it has any for this CPU."""
    for path in sorted(Path(llama_cpp.__file__).parent.glob("lib/libggml-cpu*.so*")):
        with suppress(OSError):  # not loaded: a library for another CPU
            call = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).smelt_use_row_kernels
            call.argtypes, call.restype = [ctypes.c_bool], ctypes.c_bool
            return bool(call(is_wanted))
    raise SystemExit("llama.cpp was built without row_kernels.cpp")


def features() -> str:
    """What of this CPU the build uses, e.g. "AVX2, FMA"."""
    told = llama_cpp.llama_print_system_info().decode().replace("CPU :", "")
    pairs = (entry.split("=") for entry in told.split("|") if "=" in entry)
    return ", ".join(name.strip() for name, value in pairs if value.strip() == "1")


def last_logits(path: Path, tokens: list[int], rows_per_call: int) -> np.ndarray:
    """Logits (VOCAB,) float32 after `tokens`, decoded `rows_per_call` at a time."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 256, ROWS, 2, 2
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("the random model could not be loaded")
    for start in range(0, len(tokens), rows_per_call):
        part = (llama_cpp.llama_token * rows_per_call)(*tokens[start : start + rows_per_call])
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, rows_per_call)) != 0:
            raise SystemExit("llama_decode failed")
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (VOCAB,)).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def write_random_model(path: Path) -> None:
    """A GGUF file of one llama layer with random Q8_0 weights and no tokenizer."""
    random = np.random.default_rng(0)
    metadata: list[tuple[str, str | int | float]] = [
        ("general.architecture", "llama"),
        ("llama.block_count", 1),
        ("llama.context_length", 256),
        ("llama.embedding_length", WIDTH),
        ("llama.feed_forward_length", 2 * WIDTH),
        ("llama.attention.head_count", HEADS),
        ("llama.attention.layer_norm_rms_epsilon", 1e-6),
        ("llama.vocab_size", VOCAB),
        ("tokenizer.ggml.model", "none"),
    ]
    shapes = {
        "token_embd": (VOCAB, WIDTH),
        "output": (VOCAB, WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH),
        "blk.0.attn_v": (WIDTH, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (2 * WIDTH, WIDTH),
        "blk.0.ffn_up": (2 * WIDTH, WIDTH),
        "blk.0.ffn_down": (WIDTH, 2 * WIDTH),
    }
    tensors = [(f"{name}.weight", shape, Q8_0, _random_q8_0(random, shape)) for name, shape in shapes.items()]
    tensors += [
        (f"{name}.weight", (WIDTH,), F32, np.ones(WIDTH, np.float32).tobytes())
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    ]
    header, body = bytearray(struct.pack("<IIQQ", 0x46554747, 3, len(tensors), len(metadata))), bytearray()
    for key, value in metadata:
        header += _string(key) + _value(value)
    for name, shape, kind, data in tensors:
        header += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % ALIGNMENT)
    path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + body)


def _random_q8_0(random: np.random.Generator, shape: tuple[int, int]) -> bytes:
    blocks = np.zeros(shape[0] * shape[1] // 32, dtype=[("scale", "<f2"), ("values", "i1", 32)])
    blocks["scale"] = 1e-3
    blocks["values"] = random.integers(-127, 128, (len(blocks), 32), dtype=np.int8)
    return blocks.tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    return struct.pack("<II", UINT32, value) if isinstance(value, int) else struct.pack("<If", FLOAT32, value)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Upstream writes its own diagnostics to stderr; the exit status and our message say enough."""


if __name__ == "__main__":
    sys.exit(main())
