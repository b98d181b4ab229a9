"""Do our completions say what transformers says for the same weights? Token by token, with the logit gap of every
difference.

    python -m benchmarks.agreement --models DIR --data DIR

For every problem our greedy completion (F16 GGUF, through the platform) is fed to transformers (float32, same bf16
weights) in one pass. Where transformers' best token is ours at every step, its own greedy completion is the same. At
the first step where it is not, the gap between its two logits is listed: small gaps are rounding of F16 and of
summation order, a large one is a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import results

RUNS = (
    ("ore-11m-instruct", "basic"),
    ("ore-11m-instruct", "humaneval"),
    ("ore-11m-instruct", "mbpp"),
    ("ore-11m-base", "basic"),
    ("ore-34m-instruct", "basic"),
    ("ore-34m-instruct", "humaneval"),
    ("ore-34m-instruct", "mbpp"),
)
GAP_MAX = 0.1
CONCURRENCY = 8


def smelt(*arguments: str) -> dict[str, Any]:
    """The JSON document of a `smelt` command."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli.main", *arguments, "--json"], stdout=subprocess.PIPE, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


async def generate(address: str, digest: str, prompts: Sequence[Any], suite: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and completion ids of each prompt, greedy; none where the context is too short."""
    from smelt.inference.v1 import inference_pb2 as pb
    from smelt.inference.v1 import inference_pb2_grpc

    from smeltkit.errors import PromptTooLong
    from smeltkit.rpc.channel import call, open_channel, stream

    gate = asyncio.Semaphore(CONCURRENCY)
    async with open_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one(prompt: Any) -> tuple[list[int], list[int]]:
            chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=prompt.content)])
            field = {"chat": chat} if prompt.is_chat else {"text": prompt.content}
            asked = await call(stub.Tokenize, pb.TokenizeRequest(model=digest, **field), timeout_s=60)
            request = pb.GenerateRequest(model=digest, max_tokens=suite.max_tokens, stop=suite.stop, **field)
            ids: list[int] = []
            with suppress(PromptTooLong):
                async with gate, stream(stub.Generate, request, timeout_s=600) as replies:
                    async for reply in replies:
                        ids.extend(reply.ids)
            return list(asked.ids), ids

        return await asyncio.gather(*(one(prompt) for prompt in prompts))


def differences(
    folder: Path, problems: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]]
) -> list[dict[str, Any]]:
    """The first step of each problem at which transformers prefers another token, with the gap of the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for problem, (prompt, completion) in zip(problems, pairs, strict=True):
        if not completion:
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        ours = torch.tensor(completion)
        gaps = logits.max(dim=-1).values - logits.gather(1, ours[:, None])[:, 0]
        steps = torch.nonzero(gaps > 0)
        if len(steps):
            step = int(steps[0])
            found.append({"problem": problem, "step": step, "gap": round(float(gaps[step]), 5)})
    return found


def run(models: Path, data: Path, model: str, suite_name: str) -> dict[str, Any]:
    """Our score of one model on one suite, and every completion that differs."""
    from services.evaluator.problems import load_problems
    from services.evaluator.prompts import build_prompts
    from services.evaluator.suites import find_suite

    source = smelt("import", str(models / model), "--name", model)["artifact"]["digest"]
    made = smelt("quantize", model, "--scheme", "F16", "--name", f"{model}:f16")["artifact"]["digest"]
    report = smelt("eval", "--suite", suite_name, "--data", str(data), f"{model}:f16")
    suite = find_suite(suite_name)
    problems = load_problems(suite, (data / suite.data.file).read_bytes())
    address = smelt("status")["gateway_grpc"]
    pairs = asyncio.run(generate(address, made, build_prompts(suite, problems), suite))
    found = differences(models / model, [problem.id for problem in problems], pairs)
    return {
        "model": model,
        "suite": suite_name,
        "bundle": source,
        "passed": report["scores"][0]["passed"],
        "problems": len(problems),
        "too_long": sum(not ids for _, ids in pairs),
        "tokens": sum(len(ids) for _, ids in pairs),
        "differ": len(found),
        "largest_gap": max((row["gap"] for row in found), default=0.0),
        "differences": found,
    }


def main() -> int:
    """Exit status 1 if a difference is too large to be rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("../shared/models"), help="folder of the models")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the suites' data")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["SMELT_HOME"] = home
        rows: list[dict[str, Any]] = []
        try:
            for model, suite in RUNS:
                rows.append(run(arguments.models, arguments.data, model, suite))
                results.save("agreement", rows, peer="transformers, float32", gap_max=GAP_MAX)
        finally:
            smelt("down")
    print(results.table([{key: row[key] for key in row if key not in ("differences", "bundle")} for row in rows]))
    return int(any(row["largest_gap"] > GAP_MAX for row in rows))


if __name__ == "__main__":
    sys.exit(main())
