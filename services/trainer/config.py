"""Settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Prefix `SMELT_TRAINER_`."""

    inference_address: str
    """Inference that probes what was trained: host:port, several separated by commas."""
    cache_dir: Path = Path(".smelt/cache/trainer")
    """Folder of fetched bundles, of runs and their checkpoints."""
    cache_bytes: int = 20 * limits.GIB
    """Bytes that fetched bundles may take, except for what is in use."""
    slots: int = 1
    """Trainings at once, 1 to 64."""
    threads: int = 0
    """Threads of a training; 0 to leave it to torch."""
    nvidia_smi: str = "nvidia-smi"
    """Program that tells of this machine's GPUs; without it they are used and not guarded."""
    gpu_reserve_bytes: int = 512 * limits.MIB
    gpu_beside_strangers: bool = False
    """Whether trainings may take a GPU on which a process without a lease computes, such as one that serves models."""
    """Bytes of each GPU that no training may lease."""

    tensorboard_dir: str = ""
    """Folder below which trainings that ask for it write event files of TensorBoard; empty for none."""
    mlflow_uri: str = ""
    """Address of the MLflow server that trainings may report to; empty for none."""

    @property
    def destinations(self) -> dict[str, str]:
        """Tool that a training's numbers may be exported to, to where; empty where they may not."""
        return {"tensorboard": self.tensorboard_dir, "mlflow": self.mlflow_uri}

    def __post_init__(self) -> None:
        if ":" not in self.inference_address:
            raise BadConfig(f"inference_address={self.inference_address!r} must be host:port")
        if not 1 <= self.slots <= 64 or not 0 <= self.threads <= 1024:
            raise BadConfig(f"slots={self.slots} must be 1 to 64 and threads={self.threads} 0 to 1024")
        if self.gpu_reserve_bytes < 0:
            raise BadConfig(f"gpu_reserve_bytes={self.gpu_reserve_bytes} must be 0 or more")
        if self.cache_bytes < limits.MIB:
            raise BadConfig(f"cache_bytes={self.cache_bytes} must be at least {limits.MIB}")


@dataclass(frozen=True, kw_only=True)
class ProofConfig:
    """Prefix `SMELT_PROOF_`: what a node of the pool must show before it trains."""

    device: str = "cuda"
    """Device that trainings need: cuda or cpu."""
    floor_tflops: float = 0.0
    """TFLOP/s that a large product in bf16 must reach; 0 for any."""
    dir: str = ""
    """Folder where a passed proof is kept, so that it is not repeated; empty for none."""

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise BadConfig(f"device={self.device!r} must be cuda or cpu")
        if self.floor_tflops < 0:
            raise BadConfig(f"floor_tflops={self.floor_tflops:g} must be 0 or more")
