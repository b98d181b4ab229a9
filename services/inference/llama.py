"""The engine on llama.cpp: GGUF files on the CPU, through llama-cpp-python's low-level batch interface.

One context holds all sequences, each slot with key-value cells of its own, or all in one unified memory where slots use
the same cells for a common prefix. Rows are written into numpy arrays that llama.cpp reads in place, logits are read
through a view of its output buffer, and the interpreter lock is free while it computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from services.inference.engine import EngineInfo, Logits, Rows
from smeltkit.errors import BadGguf, EngineUnavailable, OutOfMemory
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json

log = logging.getLogger(__name__)

AMX_ROWS_FLOOR: Final = 4
"""On AMX two or three rows take as long together as one after the other; its tiles pay from about four."""
LIBRARIES: Final = Path(llama_cpp.__file__).parent / "lib"
VIEWS_MAX: Final = 256
LOG_ERROR: Final = 4
OMP_PAUSE_SOFT: Final = 1
"""`omp_pause_soft` of OpenMP 5.0, section 3.2.43: gives threads back, keeps the settings."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """How a model is held."""

    slots: int
    """Sequences at once."""
    cells: int
    """Tokens in the key-value memory; llama.cpp rounds it up."""
    is_split: bool
    """Whether each slot has `cells / slots` of its own."""
    batch_rows: int
    """Rows of a step at most; llama.cpp takes no more than there are cells."""
    output_rows: int
    """Rows of a step with logits at most; at least `slots`."""
    threads: int
    """Threads that compute."""
    is_upstream: bool = False
    """Whether llama.cpp's own kernels alone compute, see `use_row_kernels`."""


class LlamaEngine:
    """One GGUF file, loaded. See `Engine`."""

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        """Loads the file at `path`; BadGguf if llama.cpp refuses it, OutOfMemory if its cells find no room."""
        use_row_kernels(not config.is_upstream)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise BadGguf(f"{path.name}: llama.cpp cannot load it; the log of this service has its reason")
        self._context = llama_cpp.llama_init_from_model(self._model, _context_params(config))
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise OutOfMemory(f"{path.name}: no memory for {config.cells} tokens; lower SMELT_INFERENCE_KV_BYTES")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = _Batch(config.batch_rows)
        self._views: dict[tuple[int, int], Logits] = {}
        self.info = self._describe(config)

    def decode(self, rows: Rows) -> Logits:
        """See `Engine.decode`."""
        outputs = self._batch.fill(rows)
        status = llama_cpp.llama_decode(self._context, self._batch.struct)
        if status != 0:
            raise EngineUnavailable(f"llama.cpp could not compute a step of {len(rows.tokens)} rows (status {status})")
        return self._logits(outputs)

    def share(self, source: int, target: int, count: int) -> None:
        """See `Engine.share`. Cells of a slot's own are copied, which llama.cpp does for whole slots only."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.cut(target, count)

    def cut(self, slot: int, count: int) -> None:
        """See `Engine.cut`."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, count, -1)

    def rest(self) -> None:
        """See `Engine.rest`. A second engine of the process would else sleep at every barrier of its steps."""
        if (end_threads := _end_threads()) is not None:
            end_threads(OMP_PAUSE_SOFT)

    def close(self) -> None:
        """See `Engine.close`."""
        self._views.clear()
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _logits(self, outputs: int) -> Logits:
        """A view of the output buffer; kept, because making one costs more than reading it."""
        address = _get_logits()(self._context)
        if (view := self._views.get((address, outputs))) is None:
            if len(self._views) >= VIEWS_MAX:
                self._views.clear()
            buffer = (ctypes.c_float * self.info.vocab_size * outputs).from_address(address)
            view = np.ctypeslib.as_array(buffer)
            self._views[address, outputs] = view
        return view

    def _describe(self, config: LlamaConfig) -> EngineInfo:
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        return EngineInfo(
            name="llama",
            digest=engine_digest(config.threads, is_upstream=config.is_upstream),
            device="cpu",
            vocab_size=int(llama_cpp.llama_vocab_n_tokens(vocab)),
            slots=config.slots,
            cells=int(llama_cpp.llama_n_ctx(self._context)),
            slot_cells=int(llama_cpp.llama_n_ctx_seq(self._context)),
            batch_rows=int(llama_cpp.llama_n_batch(self._context)),
            output_rows=config.output_rows,
            rows_floor=AMX_ROWS_FLOOR if _has_amx() else 1,
        )


class _Batch:
    """llama.cpp's batch over numpy arrays of `rows` rows; every row belongs to one sequence."""

    def __init__(self, rows: int) -> None:
        self._tokens, self._positions, self._slots = (np.zeros(rows, np.int32) for _ in range(3))
        self._outputs = np.zeros(rows, np.int8)
        self._ones = np.ones(rows, np.int32)
        self._slot_addresses = self._slots.ctypes.data + self._slots.itemsize * np.arange(rows, dtype=np.uint64)
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, llama_cpp.llama_token),
            embd=None,
            pos=_pointer(self._positions, llama_cpp.llama_pos),
            n_seq_id=_pointer(self._ones, ctypes.c_int32),
            seq_id=_pointer(self._slot_addresses, ctypes.POINTER(llama_cpp.llama_seq_id)),
            logits=_pointer(self._outputs, ctypes.c_int8),
        )

    def fill(self, rows: Rows) -> int:
        """Writes `rows` and returns how many of them want logits."""
        count = len(rows.tokens)
        self._tokens[:count] = rows.tokens
        self._positions[:count] = rows.positions
        self._slots[:count] = rows.slots
        self._outputs[:count] = rows.outputs
        self.struct.n_tokens = count
        return sum(rows.outputs)


@cache
def engine_digest(threads: int, *, is_upstream: bool = False) -> str:
    """Digest of what decides the numbers: compiled libraries, what they find in this CPU, threads, whose kernels."""
    libraries = sorted({path.resolve() for path in LIBRARIES.glob("lib*.so*")})
    return digest_bytes(
        canonical_json(
            {
                "engine": "llama",
                "version": llama_cpp.__version__,
                "system": system_info(),
                "machine": platform.machine(),
                "threads": threads,
                "is_upstream": is_upstream,
                "libraries": [hashlib.sha256(path.read_bytes()).hexdigest() for path in libraries],
            }
        )
    )


@cache
def system_info() -> str:
    """llama.cpp's own account of its build and of the CPU features it uses."""
    _start_backend()
    return str(llama_cpp.llama_print_system_info().decode())


def use_row_kernels(is_wanted: bool) -> bool:
    """Whether models loaded from now on multiply quantized weights by our kernels: as wanted, where this CPU has them.

    They compute many rows at once several times faster than llama.cpp's own, and give a row the same numbers whatever
    others are beside it. Their source is `scripts/llama/row_kernels.cpp`. Not to be changed while a model is loaded.
    """
    _start_backend()
    return bool(_row_kernels()(is_wanted))


def has_row_kernels() -> bool:
    """Whether our kernels compute, now that this switches them on: llama.cpp's for AMX, where that works, go before."""
    return use_row_kernels(True) and not _has_amx()


def _has_amx() -> bool:
    return "AMX_INT8 = 1" in system_info()


@cache
def _row_kernels() -> Any:
    """The switch in the library that computes; without effect in one that was built without our kernels."""
    for path in LIBRARIES.glob("libggml-cpu*.so*"):
        with suppress(OSError):  # not loaded: a library for another CPU
            if call := getattr(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD), "smelt_use_row_kernels", None):
                call.argtypes, call.restype = [ctypes.c_bool], ctypes.c_bool
                return call
    return lambda _: False


@cache
def _start_backend() -> None:
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    registry = ctypes.CDLL(str(LIBRARIES / "libggml.so"))
    if registry.ggml_backend_reg_count() == 0:  # a build for many CPUs: it takes the best library that runs on this one
        registry.ggml_backend_load_all_from_path(str(LIBRARIES).encode())
    llama_cpp.llama_backend_init()
    _row_kernels()(False)  # makes them known, which is possible only before a model is loaded


@cache
def _get_logits() -> Any:
    """llama.cpp's call for the output buffer, as a plain address: the binding's pointer costs ten times as much."""
    call = ctypes.CDLL(str(LIBRARIES / "libllama.so")).llama_get_logits
    call.argtypes, call.restype = [ctypes.c_void_p], ctypes.c_void_p
    return call


@cache
def _end_threads() -> Any:
    """OpenMP's call that ends the helper threads of its caller; None where llama.cpp was built without OpenMP."""
    try:
        return ctypes.CDLL(str(LIBRARIES / "libggml-base.so")).omp_pause_resource_all
    except (OSError, AttributeError):
        return None


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, data: object) -> None:
    """Upstream's errors as ours; its chatter and its warnings, which mistake our settings for accidents, stay out."""
    if level == LOG_ERROR:
        log.error("llama.cpp: %s", text.decode(errors="replace").rstrip())


def _context_params(config: LlamaConfig) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = config.cells, config.slots, not config.is_split
    params.n_batch = params.n_ubatch = config.batch_rows
    params.n_outputs_max = config.output_rows
    params.n_threads = params.n_threads_batch = config.threads
    params.no_perf = True
    return params


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
