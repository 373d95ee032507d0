"""Texts by many classifiers at once: each row by its own member and head, members mixed within a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from eigenpeft.tuners.serving.bank import AdapterBank


@torch.no_grad()
def classify_texts(
    bank: AdapterBank,
    *,
    model: nn.Module,
    processing_class: Any,
    texts: Sequence[tuple[str, ...]],
    members: Sequence[str],
    batch_size: int = 64,
    max_length: int = 512,
) -> list[Tensor]:
    """Logits of every text by its own member.

    Args:
        bank: Members with their heads.
        model: Classifier of the base that the bank's subspace was built for, in evaluation mode.
        processing_class: Tokenizer of that model.
        texts: One text, or a pair, per row.
        members: Name of each row's member; "__base__" for the model as it is.
        batch_size: Rows per forward pass, of nearly equal length and of any members.
        max_length: Longer rows are cut off after so many tokens.

    Returns:
        One tensor (labels of its head,) per row, in the order of the texts.

    Raises:
        SubspaceError: If a member is not in the bank, or the bank does not fit the model.
    """
    order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    with bank.attached(model), tqdm(total=len(texts), desc="Classifying") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            columns = [list(column) for column in zip(*(texts[row] for row in rows), strict=True)]
            tokens = processing_class(
                *columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            with bank.use([members[row] for row in rows], logits="list"):
                logits = model(**tokens.to(device)).logits
            found |= zip(rows, logits, strict=True)
            bar.update(len(rows))
    return [found[row] for row in range(len(texts))]
