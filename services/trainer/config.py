"""Settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.trainer.parallel.groups import LOOPBACK
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
    gpu_beside_strangers: bool = False
    """Whether trainings may take a GPU on which a process without a lease computes, such as one that serves models."""
    gpu_reserve_bytes: int = 512 * limits.MIB
    """Bytes of each GPU that no training may lease."""

    nodes: int = 1
    """Machines that may share a training, this one among them, 1 to 64; others run `services.trainer.parallel.node`."""
    address: str = LOOPBACK
    """host:port of this machine at which they meet; the port must be free, and with more machines a certain one."""

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
        if not 1 <= self.nodes <= limits.TRAIN_NODES_MAX:
            raise BadConfig(f"nodes={self.nodes} must be 1 to {limits.TRAIN_NODES_MAX}")
        port = self.address.rpartition(":")[2]
        if not port.isdigit() or (self.nodes > 1 and not int(port)):
            raise BadConfig(f"address={self.address!r} must be host:port, and with nodes={self.nodes} a certain port")
        if self.gpu_reserve_bytes < 0:
            raise BadConfig(f"gpu_reserve_bytes={self.gpu_reserve_bytes} must be 0 or more")
        if self.cache_bytes < limits.MIB:
            raise BadConfig(f"cache_bytes={self.cache_bytes} must be at least {limits.MIB}")


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Prefix `SMELT_NODE_`: a machine that takes part in trainings that another one has."""

    runs_dir: Path
    """Folder of the runs, `runs` in the trainer's cache, on storage that all machines of a training share."""
    address: str = ""
    """Host name or address of this machine at which the others reach it; empty for its full host name."""
    wait_s: float = 86400.0
    """Seconds to wait for a training that wants this machine, above 0."""

    def __post_init__(self) -> None:
        if self.wait_s <= 0:
            raise BadConfig(f"wait_s={self.wait_s:g} must be above 0")


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
