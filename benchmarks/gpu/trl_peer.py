"""LoRA and QLoRA as TRL's users run them: SFTTrainer over peft and, for QLoRA, bitsandbytes.

Its defaults are recomputation, bf16 autocast, and a head and loss in one; with Liger it keeps activations, as fast as
it can be. Rows are of equal length, so nothing is padded; rate, clipping and decay are those of the other contenders.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from benchmarks.gpu.contenders import LEARNING_RATE, RANK, to_bitsandbytes, transformers_model


def measure(
    shape: str, rows: torch.Tensor, sequences: int, *, method: str, with_liger: bool
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step over `rows` [steps * sequences, tokens], on the GPU, for QLoRA in NF4."""
    model = transformers_model(shape, torch.bfloat16)
    if method == "qlora":
        to_bitsandbytes(model.model)
        model.is_loaded_in_4bit = True
    return train(model, rows, sequences, with_liger=with_liger)


def train(
    model: Any, rows: torch.Tensor, sequences: int, *, with_liger: bool = False
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step of a model by SFTTrainer, with peft's adapters on all linear layers."""
    import peft
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        """Notes when steps begin and end on the device."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class InOrder(trl.SFTTrainer):  # type: ignore[misc]
        """Takes the rows as they come, as all contenders do."""

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            folder, per_device_train_batch_size=sequences, num_train_epochs=1, max_length=rows.shape[1],
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_liger_kernel=with_liger, gradient_checkpointing=not with_liger,
        )  # fmt: skip
        trainer = InOrder(
            model, settings, train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}), processing_class=words,
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return losses, [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)]
