"""Samples as packs on a device, as a step takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.trainer.data.samples import Sample
from services.trainer.run.step import Pack
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED


def idle_pack(device: torch.device | str) -> Pack:
    """What a process takes through the model that has nothing to do in a step while others have: nothing is learnt."""
    return Pack(batch=Packed.of([[0]], device), targets=torch.tensor([IGNORED], device=device), counted=0, is_idle=True)


def pack_of(samples: Sequence[Sample], device: torch.device | str) -> Pack:
    """Samples as one pack on a device."""
    targets = torch.from_numpy(np.concatenate([sample.targets for sample in samples], dtype=np.int64))
    return Pack(
        batch=Packed.of([sample.ids for sample in samples], device),
        targets=targets.to(device, non_blocking=True),
        counted=sum(sample.counted for sample in samples),
    )
