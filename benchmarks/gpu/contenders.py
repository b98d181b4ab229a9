"""Our trainer and the peer (transformers, peft, bitsandbytes, torch's fused AdamW), on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import SHAPES
from services.trainer.adapters.attach import attach
from services.trainer.optim.optimizer import Optimizer
from services.trainer.parallel.context import own_part
from services.trainer.parallel.ranks import ALONE, Ranks
from services.trainer.parallel.sharding import shard
from services.trainer.run.step import Pack, train_step
from services.trainer.settings.training import AdamSettings, LoraSettings
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import quantize_linears
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.kernels import triton_kernels

Step = Callable[..., float]
"""Tokens [sequences, length] of one step to its loss; ours also takes several such packs."""
LEARNING_RATE, RANK = 1e-4, 32


def random_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Canonical bf16 weights on the GPU, drawn as a fresh model's are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    state = {}
    for spec in config.tensors():
        value = torch.empty(spec.shape, device="cuda", dtype=torch.bfloat16)
        if spec.name.endswith("norm.weight"):
            value.fill_(1)
        else:
            value.normal_(0, 0.02, generator=generator)
        state[spec.name] = value
    return state


def ours(
    shape: str,
    method: str,
    state: str = "float32",
    ranks: Ranks = ALONE,
    *,
    regathers: bool = True,
    recomputes: bool = False,
) -> Step:
    """Our decoder and step, with optimizer state of that type; of several `ranks` this one's part.

    State `offload` is float32 in the memory of the host.
    """
    config = ModelConfig.from_hf(SHAPES[shape])
    with torch.device("meta"):
        decoder = Decoder(config, kernels=triton_kernels())
    decoder.load_state_dict(random_state(config, 0), assign=True)
    if method == "qlora":
        quantize_linears(decoder)
    if method != "full":
        torch.manual_seed(1)
        attach(decoder, LoraSettings(rank=RANK, alpha=2 * RANK))
    decoder.recomputes = recomputes
    shard(decoder, ranks, regathers=regathers)
    settings = AdamSettings(offload=True) if state == "offload" else AdamSettings(state=state)
    optimizer = Optimizer(decoder.named_parameters(), settings)

    def step(*tokens: Tensor) -> float:
        packs = [own_part(full_pack(each), ranks) for each in tokens]
        return train_step(decoder, optimizer, packs, learning_rate=LEARNING_RATE, clip_norm=1.0, ranks=ranks).loss

    return step


def full_pack(tokens: Tensor) -> Pack:
    """Sequences of equal length [sequences, length] on the GPU as one pack that learns every token."""
    count, length = tokens.shape
    positions = torch.arange(length, device="cuda").repeat(count)
    starts = torch.arange(0, count * length + 1, length, device="cuda", dtype=torch.int32)
    batch = Packed(ids=tokens.flatten(), positions=positions, starts=starts, lengths=(length,) * count)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1).flatten()
    return Pack(batch=batch, targets=targets, counted=count * (length - 1))


def peer(shape: str, method: str, state: str = "float32", *, with_liger: bool = False) -> Step:
    """transformers with SDPA: full in float32 under bf16 autocast, LoRA by peft on a bf16 base under autocast.

    QLoRA is that with bitsandbytes' layers for the linear layers of the blocks, without recomputation; `trl_peer` has
    it with. Full with bf16 state is all in bf16, rounded to nearest.

    Liger patches transformers for the rest of the process, so the peer without it must have run before.
    """
    import peft

    if with_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()

    model = transformers_model(shape, torch.float32 if method == "full" and state == "float32" else torch.bfloat16)
    if method == "qlora":
        to_bitsandbytes(model.model)
        model.is_loaded_in_4bit = True
    if method != "full":
        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(tokens: Tensor) -> float:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def transformers_model(shape: str, dtype: torch.dtype) -> Any:
    """A model of transformers with SDPA on the GPU, with the weights that ours begins with."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**SHAPES[shape])
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    own = ModelConfig.from_hf(SHAPES[shape])
    found = {
        names.canonical_to_hf(own.architecture, name): value.to(dtype) for name, value in random_state(own, 0).items()
    }
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model


def to_bitsandbytes(model: Any) -> None:
    """Replaces every linear layer of a torch model by one of bitsandbytes with the same weight in NF4."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            made = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            values = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            made.weight, made.bias = values.to(layer.weight.device), layer.bias
            model.set_submodule(name, made)
