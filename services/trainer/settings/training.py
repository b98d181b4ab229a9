"""A training's settings: strict, in human numbers, each key known or refused with the nearest one that is.

method: lora                       # lora, qlora, ia3, full or pretrain
epochs: 2
sequence_tokens: 1K
learning_rate: 2e-3
lora: {rank: 16, alpha: 32}
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import ClassVar, Final

from services.trainer.optim.schedule import KINDS
from services.trainer.run.early_stop import EarlyStopSettings
from services.trainer.settings.adalora import AdaloraSettings
from services.trainer.settings.alerts import DEFAULT_ALERTS, AlertSettings
from services.trainer.settings.columns import ColumnSettings
from services.trainer.settings.exports import ExportSettings
from services.trainer.settings.ia3 import Ia3Settings
from services.trainer.settings.neftune import NeftuneSettings
from services.trainer.settings.parallel import ParallelSettings
from services.trainer.settings.ranges import among, below_one, revision, within
from services.trainer.settings.reader import read_settings
from services.trainer.settings.spikes import SpikeSettings
from services.trainer.settings.stages import StageSettings
from smeltkit import limits
from smeltkit.errors import BadConfig, UnsupportedOption

OBSERVING: Final = ("alerts", "export", "code", "until_step", "heldout_steps", "hours_max")
"""Settings that do not change what is trained: no part of its name, its lineage or its pace."""
FILE_KEYS: Final = ("base", "data", "heldout", "name", "adapters", "sweep")
"""What the file of a training says besides its settings."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of an adapter; only with methods lora and qlora."""

    key: ClassVar = "lora"
    rank: int = 16
    """Inner dimension r, 1 to 1024."""
    alpha: float = 32.0
    """Numerator of the scale."""
    dropout: float = 0.0
    """Share of inputs of A dropped in training, 0 to below 1."""
    rank_stabilized: bool = False
    """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
    dora: bool = False
    """Whether the length of each row of a weight is learnt beside its direction (DoRA)."""
    adalora: AdaloraSettings | None = None
    """Whether ranks are shared out among the layers by importance; `rank` is then what each keeps on average."""
    targets: tuple[str, ...] = ()
    """Linear layers of every block, e.g. attn.q; empty for all of them."""

    def __post_init__(self) -> None:
        within("lora.rank", self.rank, 1, 1024)
        within("lora.alpha", self.alpha, 1e-6, 1e6)
        below_one("lora.dropout", self.dropout)
        if self.adalora:
            self.adalora.check(self.rank, is_plain=not self.dora and not self.rank_stabilized)

    @property
    def trained_rank(self) -> int:
        """Inner dimension of what is trained."""
        return self.adalora.initial_rank if self.adalora else self.rank

    @property
    def scale(self) -> float:
        """What B A is multiplied by, or P L Q, as peft has it."""
        if self.adalora:
            return self.alpha / (self.adalora.initial_rank + 1e-5)
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


AdapterSettings = LoraSettings | Ia3Settings
"""What an adapter is; each with `targets`, and `key` among the settings of a training."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Hyper-parameters of AdamW (Loshchilov and Hutter, arXiv:1711.05101)."""

    beta1: float = 0.9
    """Decay of the mean of gradients, 0 to below 1."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients, 0 to below 1."""
    eps: float = 1e-8
    """Added to the root of that mean, above 0."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) never decay."""
    state: str = "float32"
    """Type of the moments: float32, int8 (blocks of 8 bits), or bfloat16, which also keeps no float32 copy of the
    weights, and rounds both stochastically."""
    offload: bool = False
    """Whether moments and float32 copies lie in the memory of the host instead of the GPU's, and are updated there."""

    def __post_init__(self) -> None:
        among("optimizer.state", self.state, ("float32", "int8", "bfloat16"))
        below_one("optimizer.beta1", self.beta1)
        below_one("optimizer.beta2", self.beta2)
        within("optimizer.eps", self.eps, 1e-16, 1.0)
        within("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """Dimensions of a model that begins with random weights; 0 for those of the base."""

    layers: int = 0
    """Blocks."""
    hidden_size: int = 0
    """Width of the residual stream."""
    intermediate_size: int = 0
    """Inner width of the MLP."""
    heads: int = 0
    """Query heads."""
    kv_heads: int = 0
    """Key-value heads."""
    head_dim: int = 0
    """Width of a head."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            within(f"shape.{name}", value, 0, limits.DIMENSION_MAX)


@dataclass(frozen=True, kw_only=True)
class FimSettings:
    """Rows of text rearranged for filling in the middle, see `data.infill`; held-out rows stay as they are."""

    share: float = 0.0
    """Share of them that are, 0 to 1."""
    suffix_first: float = 0.5
    """Share of those in which the suffix comes before the prefix, 0 to 1."""

    def __post_init__(self) -> None:
        within("fim.share", self.share, 0.0, 1.0)
        within("fim.suffix_first", self.suffix_first, 0.0, 1.0)
        if not self.share and self.suffix_first != FimSettings.suffix_first:
            raise UnsupportedOption("fim.suffix_first has no effect with fim.share=0; set fim.share, or remove it")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(StageSettings):
    """Everything about a training but its model and its data."""

    stages: tuple[StageSettings, ...] = ()
    """What follows one upon the other in one run, each with data of its own; empty for a run of one stage, which is
    then what the keys above say. Optimizer, schedule and random state go on from each to the next."""
    method: str = "lora"
    """`lora`, `qlora` (lora on a base in NF4), `ia3` (learnt vectors), `full`, or `pretrain` (all weights, on text rows
    only)."""
    init: str = "base"
    """Weights to begin with, only with method pretrain: those of the `base`, or `random` ones of its shape."""
    shape: ShapeSettings = field(default_factory=ShapeSettings)
    """Other dimensions than the base's; only with init random."""
    until_step: int = 0
    """Step after which the run pauses: its state is stored, and a training that asks for a later step, or for all of
    them, goes on from there. 0 for no pause."""
    data_format: str = "rows"
    """What the data files are: `rows`, in JSONL or Parquet, `csv` or `tsv`, or `text`, each file one document."""
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    """Which columns of rows are read; CSV and TSV need it."""
    ids_of: str = ""
    """Digest of the tokenizer.json that made the ids in rows of ids; must be that of the base."""
    fim: FimSettings = field(default_factory=FimSettings)
    sequence_tokens: int = 1024
    """Tokens of the longest sample."""
    pack_tokens: int = 0
    """Tokens of a pack, which goes through the model at once; 0 for those of the longest sample."""
    packs_per_step: int = 4
    """Packs whose gradients are added up in one step."""
    processes: int = 1
    """Processes that share the training, each on a GPU of its own (or some cores, where there is no GPU): weights,
    gradients and optimizer state are spread over them, and each takes its packs of a step; 1 to 64."""
    nodes: int = 1
    """Machines that have as many of the processes each; 1 to 64."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """Whether some of them share layers, or the tokens of a pack, instead."""
    regather: bool = True
    """Whether several processes give a layer's weights away between forward and backward pass, to save memory; if
    not, frozen weights are whole in each of them. Those in NF4 are in any case."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    schedule: str = "cosine"
    """cosine, linear, constant or wsd."""
    warmup_steps: int = 0
    """Steps until the full rate, at most a tenth of all."""
    horizon_steps: int = 0
    """What the caller believes the number of steps to be; refused if it is another. 0 for no belief."""
    final_share: float = 0.1
    """Last learning rate by the highest."""
    clip_norm: float = 1.0
    """Bound of the global gradient norm."""
    seed: int = 0
    """Decides shuffles, dropout, adapters and what is rearranged."""
    dtype: str = "float32"
    """Type of the weights while training, of dequantized ones too: float32 or bfloat16."""
    recompute: bool = False
    """Whether activations are computed again in the backward pass, to save memory."""
    checkpoint_steps: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""
    stuck_steps: int = 50
    """Steps of one and the same loss after which the run ends, 2 to 1000."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    ia3: Ia3Settings = field(default_factory=Ia3Settings)
    optimizer: AdamSettings = field(default_factory=AdamSettings)
    neftune: NeftuneSettings | None = None
    """Noise on the embeddings; none unless it is given."""
    spikes: SpikeSettings = field(default_factory=SpikeSettings)
    heldout_steps: int = 0
    """Steps between measurements of the held-out loss during the run; 0 for one before and one after it."""
    early_stop: EarlyStopSettings = field(default_factory=EarlyStopSettings)
    alerts: tuple[AlertSettings, ...] = DEFAULT_ALERTS
    """What is told of the run's numbers; an empty list for nothing. They do not change what is trained."""
    export: ExportSettings = field(default_factory=ExportSettings)
    hours_max: float = 0.0
    """Device hours that the plan may foresee, over all processes; a training that takes more is refused. 0 for any."""
    code: str = ""
    """Revision of the trainer that must do all of it, as the plan tells it; empty for any. A training that another
    trainer than it began with goes on with says so."""

    def __post_init__(self) -> None:
        among("method", self.method, ("lora", "qlora", "ia3", "full", "pretrain"), {"dora": "lora: {dora: true}"})
        among("init", self.init, ("base", "random"))
        among("schedule", self.schedule, KINDS)
        among("data_format", self.data_format, ("rows", "csv", "tsv", "text"))
        revision("code", self.code)
        self._check_columns()
        among("dtype", self.dtype, ("float32", "bfloat16"))
        whole = {"sequence_tokens": (8, 1 << 20), "pack_tokens": (0, 1 << 24), "seed": (0, 2**63 - 1),
                 "packs_per_step": (1, 65536), "warmup_steps": (0, 10**9), "checkpoint_steps": (1, 10**9),
                 "until_step": (0, 10**9), "heldout_steps": (0, 10**9), "keep_checkpoints": (1, 1000),
                 "stuck_steps": (2, 1000),
                 "horizon_steps": (0, 10**9), "processes": (1, limits.TRAIN_PROCESSES_MAX),
                 "nodes": (1, limits.TRAIN_NODES_MAX)}  # fmt: skip
        for name, (low, high) in whole.items():
            within(name, getattr(self, name), low, high)
        within("hours_max", self.hours_max, 0.0, 1e6)
        within("learning_rate", self.learning_rate, 1e-12, 1.0)
        within("final_share", self.final_share, 0.0, 1.0)
        within("clip_norm", self.clip_norm, 1e-6, 1e6)
        for own in (self.lora, self.ia3):
            if own != type(own)() and not (self.is_adapted and own is self.adapter):
                raise UnsupportedOption(
                    f"{own.key} settings have no effect with method {self.method}; remove them, or choose {own.key}"
                )
        if self.method == "ia3" and (self.optimizer.weight_decay or self.optimizer.state == "int8"):
            raise UnsupportedOption(
                "optimizer.weight_decay and state int8 have no effect on vectors, all of method ia3; remove them"
            )
        if 0 < self.pack_tokens < self.sequence_tokens:
            raise BadConfig(
                f"pack_tokens={self.pack_tokens} holds no sample of sequence_tokens={self.sequence_tokens}; raise it"
            )
        self._check_stages()
        self._check_processes()
        if self.init != "base" and self.method != "pretrain":
            raise UnsupportedOption(f"init={self.init!r} has no effect with method {self.method}; choose pretrain")
        if self.init == "base" and self.shape != ShapeSettings():
            raise UnsupportedOption("shape has no effect with the weights of the base; set init: random")
        if self.optimizer.state == "bfloat16" and (self.is_adapted or self.dtype == "float32"):
            raise UnsupportedOption(
                "optimizer.state=bfloat16 has no effect on float32 weights, adapters among them; choose method full"
                " with dtype bfloat16, or remove it"
            )
        if self.optimizer.offload and self.optimizer.state == "bfloat16":
            raise UnsupportedOption(
                "optimizer.offload moves float32 copies, which state=bfloat16 has none of; choose one"
            )
        if self.schedule == "constant" and self.final_share != TrainSettings.final_share:
            raise UnsupportedOption("final_share has no effect with schedule constant; remove it")

    def _check_stages(self) -> None:
        """Each in its ranges, and nothing said of the whole that only its stages can say."""
        self.check()
        if len(self.stages) > limits.TRAIN_STAGES_MAX:
            raise BadConfig(f"stages has {len(self.stages)} of them; {limits.TRAIN_STAGES_MAX} at most can be")
        for number, stage in enumerate(self.stages):
            stage.check(f"stages[{number}].")
        for known in dataclasses.fields(StageSettings) if self.stages else ():
            if (value := getattr(self, known.name)) != known.default:
                raise UnsupportedOption(
                    f"{known.name}={value!r} has no effect beside stages, which each have their own; move it into them"
                )

    def _check_columns(self) -> None:
        """Which columns are read, and whether the data files can have them."""
        if self.data_format == "text" and self.columns.names:
            raise UnsupportedOption("columns have no effect with data_format=text, whose files have none; remove them")
        if self.data_format in ("csv", "tsv") and not self.columns.text and not self.columns.prompt:
            raise BadConfig(
                f"data_format={self.data_format!r} needs columns that hold text: columns: {{text: NAME}}, or"
                " {prompt: NAME, response: NAME}"
            )

    def _check_processes(self) -> None:
        """How the processes share the work, and what that leaves without effect."""
        tensor, context = self.parallel.tensor, self.parallel.context
        if self.processes % self.nodes:
            raise BadConfig(f"processes={self.processes} must be a multiple of nodes={self.nodes}")
        if self.processes % (tensor * context):
            raise BadConfig(
                f"processes={self.processes} cannot be arranged by parallel.tensor={tensor} and parallel.context="
                f"{context}; make it a multiple of {tensor * context}"
            )
        if self.packs_per_step % self.replicas:
            among_them = "processes" if self.replicas == self.processes else "processes / (tensor * context)"
            raise BadConfig(
                f"packs_per_step={self.packs_per_step} cannot be shared evenly by {among_them}={self.replicas}; make it"
                f" {-(-self.packs_per_step // self.replicas) * self.replicas}"
            )
        if self.shards == 1 and not self.regather:
            layers = f" and parallel.tensor={tensor}" if tensor > 1 else ""
            raise UnsupportedOption(f"regather has no effect with processes={self.processes}{layers}; remove it")
        if self.pack_size_tokens < 2 * context:
            raise BadConfig(
                f"parallel.context={context} needs packs of {2 * context} tokens at least, not {self.pack_size_tokens};"
                f" lower it to {self.pack_size_tokens // 2}"
            )
        if tensor > 1 and (self.method in ("qlora", "ia3") or self.lora.dora):
            raise UnsupportedOption(
                f"parallel.tensor={tensor} splits neither weights in NF4 nor DoRA nor vectors of ia3; choose lora"
                " without dora, or set it to 1 and use parallel.context"
            )
        if self.lora.adalora:
            self.lora.adalora.check_processes(self.processes, is_elsewhere=self.optimizer.offload)
        if tensor > 1 and self.neftune:
            raise UnsupportedOption(
                f"parallel.tensor={tensor} computes each token in several processes, which draw noise of their own;"
                " remove neftune, or set it to 1 and use parallel.context"
            )
        if self.processes > 1 and (self.optimizer.offload or self.optimizer.state == "int8"):
            raise UnsupportedOption(
                f"processes={self.processes} spread the optimizer's state already; remove optimizer.offload and state"
                " int8, or set processes to 1"
            )

    @property
    def curriculum(self) -> tuple[StageSettings, ...]:
        """What the run is made of, at least one."""
        return self.stages or (self,)

    @property
    def files(self) -> int:
        """Data files of all stages, one after the other."""
        return sum(len(stage.passes) for stage in self.curriculum)

    @property
    def replicas(self) -> int:
        """Groups of processes that each take packs of their own; within one they share layers or tokens."""
        return self.processes // (self.parallel.tensor * self.parallel.context)

    @property
    def shards(self) -> int:
        """Processes over which the same part of the model is spread: all of them, unless they share layers."""
        return self.processes // self.parallel.tensor

    @property
    def pack_size_tokens(self) -> int:
        """Most tokens that go through the model at once."""
        return self.pack_tokens or self.sequence_tokens

    @property
    def measures_on_the_way(self) -> bool:
        """Whether the held-out loss is measured while the run goes on."""
        return bool(self.heldout_steps or self.early_stop.steps)

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are trained and merged at the end, instead of the weights themselves."""
        return self.method in ("lora", "qlora", "ia3")

    @property
    def adapter(self) -> AdapterSettings:
        """What is trained, if adapters are."""
        return self.ia3 if self.method == "ia3" else self.lora


def parse_settings(text: str) -> TrainSettings:
    """The settings in canonical JSON; BadConfig or UnsupportedOption name the key, its value and what is allowed."""
    if len(text.encode()) > limits.TRAIN_SETTINGS_MAX_BYTES:
        raise BadConfig(f"the settings exceed {limits.TRAIN_SETTINGS_MAX_BYTES} bytes")
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"the settings are no JSON: {error}") from error
    return read_settings(TrainSettings, value, beside=FILE_KEYS)
