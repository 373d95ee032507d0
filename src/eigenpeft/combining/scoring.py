"""How well a merged adapter does tasks on held-out rows: the score that a multiplier is chosen by."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.combining.heads import put_head
from eigenpeft.combining.merged import MergedAdapter, find_module
from eigenpeft.errors import AdapterConfigError

METRICS = ("accuracy", "loss")


@dataclass(frozen=True)
class HeldOutTask:
    """Held-out rows of one task.

    Attributes:
        name: The task; where the merged adapter has a head of that name, it is put into the model.
        model: Base model, in evaluation mode, as the task needs it: with its number of labels.
        batches: Batches that the model takes, `labels` included.
    """

    name: str
    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]


def held_out_score(tasks: Sequence[HeldOutTask], *, metric: str = "accuracy") -> Callable[[MergedAdapter], float]:
    """A score for `merge(..., scale=[...], score=...)`: the mean over tasks, large where the merged adapter does well.

    Args:
        tasks: With their rows.
        metric: "accuracy", the share of rows whose largest logit is the label's; or "loss", minus the model's own loss.

    Returns:
        Function of a merged adapter. The models are left as they were, bit for bit.

    Raises:
        ArtifactError: When the function is called, if a head does not fit the model.
        AdapterConfigError: If the metric is unknown or there is no task; when the function is called, if the model lacks a module
            or gives something else than a row of logits per example.
    """
    if metric not in METRICS or not tasks:
        raise AdapterConfigError(
            f"metric={metric!r} on {len(tasks)} tasks; pass one of {', '.join(map(repr, METRICS))} and at least one task."
        )
    measure = _accuracy if metric == "accuracy" else _loss

    def score(merged: MergedAdapter) -> float:
        values = []
        for task in tasks:
            if task.name in merged.heads:
                put_head(task.model, merged.heads[task.name], name=task.name)
            with merged_into(task.model, merged):
                values.append(measure(task))
        return sum(values) / len(values)

    return score


@contextmanager
def merged_into(model: nn.Module, merged: MergedAdapter) -> Iterator[None]:
    """The base model with the merged update in its weights; afterwards the weights are what they were, bit for bit.

    Args:
        model: The base model.
        merged: The update.

    Raises:
        AdapterConfigError: If the model lacks a module, or has one of another shape.
    """
    modules = dict(model.named_modules())
    places: dict[str, Any] = {name: find_module(modules, name) for name in merged.factors}
    before = {name: place.weight.detach().clone() for name, place in places.items()}
    try:
        merged.apply_to(model)
        yield
    finally:
        with torch.no_grad():
            for name, place in places.items():
                place.weight.copy_(before[name])


@torch.no_grad()
def _accuracy(task: HeldOutTask) -> float:
    right, seen = 0, 0
    for batch in task.batches:
        logits = task.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        if logits.ndim != 2:
            raise AdapterConfigError(
                f"metric='accuracy' needs one row of logits per example, {task.name!r} gives {tuple(logits.shape)}; pass "
                "metric='loss' for a language model."
            )
        right += int((logits.argmax(dim=1) == batch["labels"]).sum())
        seen += len(logits)
    return right / seen


@torch.no_grad()
def _loss(task: HeldOutTask) -> float:
    losses = [(float(task.model(**batch).loss), len(batch["labels"])) for batch in task.batches]
    return -sum(loss * size for loss, size in losses) / sum(size for _, size in losses)
