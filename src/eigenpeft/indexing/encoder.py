"""Texts as vectors by the base model itself: the mean of its last hidden states over the tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from eigenpeft.errors import EigenPeftError

Encoder = Callable[[Sequence[str]], Any]
"""From texts to (n, d) numbers: a `BaseModelEncoder`, or such as the `encode` of a sentence encoder."""


class BaseModelEncoder:
    """Mean of the last hidden states over the tokens of each text, scaled to unit length.

    Args:
        model: Model without a head, or with one that returns `hidden_states`; it stays where it is, in evaluation mode.
        processing_class: Its tokenizer.
        name: What the index records of it; None takes the config's name.
        max_length: Tokens of a text that count.
        batch_size: Texts at a time.

    Examples:
        >>> from eigenpeft.demo import base_model
        >>> encoder = BaseModelEncoder.from_pretrained(base_model())
        >>> encoder(["Where is my card?"]).shape
        torch.Size([1, 384])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processing_class: Any,
        name: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
    ):
        self.model, self.processing_class = model, processing_class
        self.name = name or str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        self.max_length, self.batch_size = max_length, batch_size

    @classmethod
    def from_pretrained(cls, base_model: str, *, max_length: int = 128, batch_size: int = 32) -> "BaseModelEncoder":
        """The encoder of a base model, which is loaded without a head.

        Args:
            base_model: Folder or Hub id.
            max_length: Tokens of a text that count.
            batch_size: Texts at a time.
        """
        model = AutoModel.from_pretrained(base_model).eval()
        return cls(
            model,
            processing_class=AutoTokenizer.from_pretrained(base_model),
            name=base_model,
            max_length=max_length,
            batch_size=batch_size,
        )

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts.

        Args:
            texts: At least one.

        Returns:
            (n, hidden size), float32, on the CPU.

        Raises:
            EigenPeftError: If the model returns no hidden states.
        """
        if self.processing_class.pad_token is None:
            self.processing_class.pad_token = self.processing_class.eos_token
        device = next(self.model.parameters()).device
        found = []
        starts = range(0, len(texts), self.batch_size)
        training = self.model.training
        self.model.eval()
        try:
            for start in tqdm(starts, desc="Embedding", unit="batch", disable=len(starts) < 20):
                part = list(texts[start : start + self.batch_size])
                batch = self.processing_class(
                    part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                )
                batch = batch.to(device)
                states = _last_states(self.model(**batch, output_hidden_states=True))
                mask = batch["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
                found.append(nn.functional.normalize(mean.float(), dim=1).cpu())
        finally:
            self.model.train(training)
        return torch.cat(found)


def _last_states(output: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        every = getattr(output, "hidden_states", None)
        states = every[-1] if every else None
    if not isinstance(states, Tensor):
        raise EigenPeftError(
            f"The model returned a {type(output).__name__} without hidden states; pass a transformers model, or an encoder of "
            "your own to AdapterIndex(encoder=...)."
        )
    return states
