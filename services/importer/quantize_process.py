"""llama.cpp's quantizer: `python -m services.importer.quantize_process SOURCE TARGET FILE_TYPE THREADS`.

A process of its own, so that its memory and its crashes are not the service's.
"""

from __future__ import annotations

import ctypes
import sys

from smeltkit.exits import REFUSED


def main(source: str, target: str, file_type: str, threads: str) -> None:
    """Quantizes; exits with REFUSED and llama.cpp's message on standard error if it refuses."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    parameters.nthread = int(threads)
    parameters.allow_requantize = False
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    sys.exit(REFUSED if status else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
