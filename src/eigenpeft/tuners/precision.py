"""A trainer callback that keeps what is trained in float32 over a quantised base."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepFloat32(TrainerCallback):
    """Sets trainable tensors back to float32 before the optimizer is made, where a trainer has rounded them.

    TRL (1.16) casts every trainable tensor of a model with a quantised base to bfloat16, as QLoRA's paper does for LoRA,
    whose factors are small. Coefficients are of size 1, where bfloat16's spacing is 0.008: a step of AdamW at a learning
    rate of 1e-4 is rounded away. Harmless where nothing was cast.

    Examples:
        >>> from eigenpeft.tuners.precision import KeepFloat32
        >>> trainer = SFTTrainer(model, callbacks=[KeepFloat32()], peft_config=config)  # doctest: +SKIP
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer at the end of its own making.

        Args:
            args: The trainer's.
            state: The trainer's.
            control: The trainer's.
            model: Model to be trained.
            **kwargs: The trainer's.
        """
        for parameter in () if model is None else model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
