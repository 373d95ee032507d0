"""A callback that keeps trained coefficients in float32 on quantised base models."""

from typing import Any

import torch
from transformers import TrainerCallback


class Float32Callback(TrainerCallback):
    """Cast every trainable tensor to float32 once the trainer is made, before its optimizer is.

    TRL's trainers cast trainable tensors to bfloat16 when the base model is quantised (arXiv 2305.14314, paragraph 3).
    That suits LoRA's small entries; a coefficient between 1 and 2 does not move by steps below 4e-3, half of the spacing there.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2).to(torch.bfloat16)
        >>> Float32Callback().on_init_end(None, None, None, model=model)
        >>> model.weight.dtype
        torch.float32
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Cast; called by the trainer.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state; not used.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.
        """
        for parameter in model.parameters() if model is not None else ():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
