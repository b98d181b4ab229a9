"""Whether one image computes on every CPU: its llama.cpp under emulated processors, and on this machine's own.

The emulation (qemu-user) knows processors up to AVX2. What is picked is what the processor can, and a batch of a random
model agrees with single rows: `scripts/llama/prove_decode.py`, run with the image's Python and libraries. Then the
shipped model answers prompts of a suite, as Q8_0, and must choose the tokens that the llama.cpp which was built on this
machine chooses, up to a near tie. On this machine each library of the image that its CPU can run is also made to
compute, in place of the best.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scripts.images.catalogue import ROOT
from scripts.images.trial import MODEL, SUITE
from smeltkit.config import environment
from smeltkit.errors import BadConfig, EngineUnavailable
from smeltkit.ml.gguf_convert import convert_to_gguf

KINDS = {
    "Nehalem": ({"SSSE3"}, {"AVX", "AVX2"}),
    "SandyBridge": ({"SSSE3"}, {"AVX2"}),
    "Haswell-noTSX": ({"AVX2"}, {"AVX512"}),
}
"""Emulated processors: what must be used there, and what must not."""
HERE, CHOSEN = "this machine", "chosen"
OUR_KERNELS = "with and without our kernels"
"""What the proof says where it computed by them too."""
NOT_HERE = "does not run on this CPU"
"""What the proof says of a library that the CPU cannot run."""
_PROOF = ROOT / "scripts" / "llama" / "prove_decode.py"
_CHOSEN = f"""
import runpy
from services.inference.llama import system_info
system_info()
runpy.run_path({str(_PROOF)!r}, run_name="__main__")
"""
_NEEDED_BY_OURS = "AVX512_VNNI"
_TIMEOUT_S, _THREADS = 900, 2
_ANSWERS = Path(__file__).with_name("answers.py")
_PROMPTS, _PROMPTS_EMULATED = 6, 1
"""An emulated processor takes a minute for each."""
NEAR_TIE = 0.1
"""Where another token is chosen than by this machine's own build, its best logit exceeded the next by this at most."""
_FILE_TYPE_Q8_0 = "7"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model, prompts as ids, and what this machine's own llama.cpp answers to them."""

    model: Path
    prompts: list[list[int]]
    answers: list[dict[str, list[Any]]]

    def first(self, count: int) -> Question:
        """Its first prompts."""
        return replace(self, prompts=self.prompts[:count], answers=self.answers[:count])

    def compared(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokens that were chosen, answers that differ from some token on, and the largest margin at such a token."""
        gaps = []
        for own, other in zip(self.answers, answers, strict=True):
            pairs = zip(own["ids"], other["ids"], own["margins"], strict=True)
            gaps += [margin for mine, theirs, margin in pairs if mine != theirs][:1]
        tokens = sum(len(answer["ids"]) for answer in answers)
        return {"tokens": tokens, "answers": len(answers), "differ": len(gaps), "largest_gap": max(gaps, default=0.0)}


@contextmanager
def question() -> Iterator[Question]:
    """The shipped model as Q8_0, and prompts of its suite."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    problems = [json.loads(line) for line in SUITE.read_text().splitlines()[:_PROMPTS]]
    prompts = [tokenizer.encode(problem["prompt"]).ids for problem in problems]
    with tempfile.TemporaryDirectory() as folder:
        exact, model = Path(folder, "exact.gguf"), Path(folder, "q8_0.gguf")
        convert_to_gguf(MODEL, exact, dtype="F16")
        command = [sys.executable, "-m", "services.importer.quantize_process", str(exact), str(model)]
        subprocess.run([*command, _FILE_TYPE_Q8_0, str(_THREADS)], check=True, capture_output=True)
        unanswered = Question(model=model, prompts=prompts, answers=[])
        done = _asked([sys.executable], unanswered, environment())
        if done.returncode:
            raise EngineUnavailable(f"this machine's own llama.cpp does not answer: {done.stderr.strip()[-300:]}")
        yield replace(unanswered, answers=json.loads(done.stdout))


def rows(root: Path, question: Question) -> list[dict[str, Any]]:
    """A row a processor and library for the image mounted at `root`: what is used, answered, and what is wrong."""
    if shutil.which("qemu-x86_64") is None:
        raise BadConfig("qemu-x86_64 is not installed; install it (Debian: apt-get install qemu-user)")
    python = str(root / "usr/bin/python3")
    loader = [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", _library_path(root), python]
    (libraries,) = root.glob("opt/smelt/lib/python3*/site-packages/llama_cpp/lib")
    names = sorted(path.name for path in libraries.glob("libggml-cpu-*.so"))
    few = question.first(_PROMPTS_EMULATED)
    emulated = {kind: ["qemu-x86_64", "-cpu", kind, "-L", str(root), python] for kind in KINDS}
    return [
        *(_row(kind, command, root, few, *KINDS[kind], "") for kind, command in emulated.items()),
        *(_row(HERE, loader, root, question, set(), set(), name) for name in ("", *names)),
    ]


def _row(
    cpu: str, python: list[str], root: Path, question: Question, wanted: set[str], unwanted: set[str], library: str
) -> dict[str, Any]:
    (packages,) = root.glob("opt/smelt/lib/python3*/site-packages")
    names = {"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"}
    proof = [str(_PROOF), library] if library else ["-c", _CHOSEN]
    done = subprocess.run([*python, *proof], env=names, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if library and NOT_HERE in done.stderr:
        return {"cpu": cpu, "library": library, "uses": NOT_HERE, "our_kernels": False, "wrong": []}
    told = re.search(r"it uses (.*)", done.stdout)
    used = set(told[1].split(", ")) if told else set()
    wrong = [] if done.returncode == 0 else [done.stderr.strip()[-300:] or f"ended with {done.returncode}"]
    wrong += [f"{feature} is not used" for feature in sorted(wanted - used) if told]
    wrong += [f"{feature} is used" for feature in sorted(unwanted & used)]
    has_ours = OUR_KERNELS in done.stdout
    if told and has_ours != (_NEEDED_BY_OURS in used):
        wrong.append(f"our kernels compute: {has_ours}; they are for CPUs with {_NEEDED_BY_OURS}")
    answered = _asked([*python], question, names, library)
    found = {} if answered.returncode else question.compared(json.loads(answered.stdout))
    if not found:
        wrong.append(f"no answer: {answered.stderr.strip()[-300:]}")
    elif found["largest_gap"] > NEAR_TIE:
        wrong.append(f"it chooses another token where this machine's own build is sure by {found['largest_gap']:.3f}")
    return {
        "cpu": cpu,
        "library": library or CHOSEN,
        "uses": ", ".join(sorted(used)),
        "our_kernels": has_ours,
        **found,
        "wrong": wrong,
    }


def _asked(
    python: list[str], question: Question, names: Mapping[str, str], library: str = ""
) -> subprocess.CompletedProcess[str]:
    """`answers.py` run by `python`."""
    return subprocess.run(
        [*python, str(_ANSWERS), str(question.model), str(_THREADS), *([library] if library else [])],
        env=names, input=json.dumps(question.prompts), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip


def _library_path(root: Path) -> str:
    return ":".join(str(root / place) for place in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
