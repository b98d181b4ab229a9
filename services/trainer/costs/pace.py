"""The pace of a training on this machine: `python -m services.trainer.costs.pace`, a process of its own.

Reads a JSON document on standard input: `config` (a model's dimensions), `settings`, `packs` (sample lengths of the
packs of one step) and `threads`. Trains copies of the model of few layers on random tokens, with the real step, and
prints a Pace at full depth as JSON. No weight, row or random state of the run itself is touched.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from typing import Any, Final

import torch

from services.trainer.adapters.attach import attach
from services.trainer.costs.forecast import at_depth
from services.trainer.costs.peak import PeakMemory
from services.trainer.optim.optimizer import Optimizer
from services.trainer.run.device import prepare_device
from services.trainer.run.step import Pack, train_step
from services.trainer.settings.training import TrainSettings, parse_settings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import quantize_linears
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.kernels import kernels_for

SHALLOW, DEEP = 1, 3
"""Layers of the two copies; a model of fewer layers is measured as it is."""
RATE: Final = 1e-6


def main() -> int:
    """Prints the pace; errors end the process with a traceback."""
    asked = json.load(sys.stdin)
    settings = parse_settings(json.dumps(asked["settings"]))
    config = ModelConfig.from_dict(asked["config"])
    device = prepare_device(asked["threads"])
    packs = asked["packs"] if device == "cuda" else asked["packs"][:1]  # on a CPU a second pack tells nothing new
    peak = PeakMemory(device)
    shallow, deep = (
        _measure(replace(config, layers=layers), settings, packs, device, peak)
        for layers in (min(SHALLOW, config.layers), min(DEEP, config.layers))
    )
    sys.stdout.write(json.dumps(asdict(at_depth(shallow, deep, config.layers))))
    return 0


def _measure(
    config: ModelConfig, settings: TrainSettings, lengths: list[list[int]], device: str, peak: PeakMemory
) -> dict[str, Any]:
    """Layers, seconds and tokens of a step, and the peak of memory."""
    decoder = Decoder(config, kernels=kernels_for(device), sequence_tokens=settings.sequence_tokens)
    decoder = decoder.to(device=device, dtype=getattr(torch, settings.dtype))
    decoder.recomputes = settings.recompute
    if settings.method == "qlora":
        quantize_linears(decoder)
    if settings.is_adapted:
        attach(decoder, settings.adapter)
    optimizer = Optimizer(decoder.named_parameters(), settings.optimizer)
    packs = [_random_pack(config, pack, device) for pack in lengths]
    times = []
    for _ in range(3):  # the first one warms up, of the others the faster one counts
        begin, begun = time.monotonic(), time.thread_time()
        train_step(decoder, optimizer, packs, learning_rate=RATE, clip_norm=settings.clip_norm)
        if device == "cuda":
            torch.cuda.synchronize()
        took_s = time.monotonic() - begin
        times.append((took_s, (time.thread_time() - begun) / took_s))
    return {
        "layers": config.layers,
        "step_s": min(times[1:])[0],
        # A step on a GPU does not wait for a processor; on a CPU the main thread computes or spins all the time.
        "processor_share": 1.0 if device == "cuda" else min(min(times[1:])[1], 1.0),
        "step_tokens": sum(map(sum, lengths)),
        "memory_bytes": peak.bytes,
    }


def _random_pack(config: ModelConfig, lengths: list[int], device: str) -> Pack:
    ids = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]
    targets = torch.randint(config.vocab_size, (sum(lengths),), device=device)
    return Pack(batch=Packed.of(ids, device), targets=targets, counted=sum(lengths))


if __name__ == "__main__":
    sys.exit(main())
