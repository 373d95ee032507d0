"""A new head trained lightly on the frozen base, so that the gradients behind it are the task's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from eigenpeft.errors import EigenPeftError

LIGHT_RATE = 1e-2
"""Learning rate of a head behind which gradients are taken: one that fits every row leaves a gradient of noise
(docs/regimes.md)."""
LIGHT_STEPS = 40


def train_light_head(
    model: PreTrainedModel,
    rows: Sequence[Any],
    *,
    data_collator: Callable[[list[Any]], Any],
    steps: int = LIGHT_STEPS,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Train what the model has on top of its base, in place, with AdamW; the base's weights and dropout rest.

    Args:
        model: Base model under a new head, such as a sequence classifier.
        rows: Tokenized, with labels.
        data_collator: Makes batches of rows.
        steps: Optimizer steps; few, so that the head does not fit every row.
        batch_size: Rows per step.
        seed: Seed of the order of the rows.

    Raises:
        EigenPeftError: If the model has nothing on top of its base.

    Examples:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification, default_data_collator
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=10, **sizes))
        >>> rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}]
        >>> before = model.classifier.weight.detach().clone()
        >>> train_light_head(model, rows, data_collator=default_data_collator, steps=2)
        >>> torch.equal(model.classifier.weight, before)
        False
    """
    prefix = f"{model.base_model_prefix}."
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith(prefix)]
    if not head:
        raise EigenPeftError(
            f"{type(model).__name__} has no head on top of its {model.base_model_prefix!r}; pass a classifier, or rows without "
            "labels for a language model."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))
    was = model.training
    model.eval()
    optimizer = torch.optim.AdamW(head, lr=LIGHT_RATE, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=data_collator, generator=order)  # pyright: ignore[reportArgumentType]
    done = 0
    with torch.enable_grad():
        while done < steps:
            for batch in loader:
                model(**{name: value.to(head[0].device) for name, value in batch.items()}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen[name])
    model.train(was)
