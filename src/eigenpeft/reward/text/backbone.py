"""Sequence-classification backbones: where their head is, and copies of them with another one."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.errors import RewardModelError

# Where Transformers keeps the last linear layer of a sequence classifier, decoder style first.
_HEADS = ("score", "classifier.out_proj", "classifier.dense_out", "classifier")


def score_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that makes the logits.

    Args:
        model: An `AutoModelForSequenceClassification` model, PEFT-wrapped or not.

    Raises:
        RewardModelError: If there is none where Transformers' models have it.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    for name in _HEADS:
        try:
            head = base.get_submodule(name)
        except AttributeError:
            continue
        head = getattr(head, "original_module", head)  # PEFT's modules_to_save wraps it
        if isinstance(head, nn.Linear):
            return name, head
    raise RewardModelError(
        f"{type(base).__name__} has no linear head named {', '.join(_HEADS)}; load the backbone with "
        "AutoModelForSequenceClassification."
    )


def reference_head(model: nn.Module) -> Tensor:
    """The head of a scalar reward model as a vector: the reference direction of a fit on its features.

    Args:
        model: A sequence classifier with one label.

    Returns:
        (n_features,) float32.

    Raises:
        RewardModelError: If it has several labels, or no linear head.
    """
    _, head = score_head(model)
    if head.out_features != 1:
        raise RewardModelError(
            f"The model's head has {head.out_features} labels; a reference reward has 1. Pass reference_head=None to fit "
            "without one."
        )
    return head.weight.detach()[0].float().cpu()


def with_head(model: nn.Module, weight: Tensor) -> Any:
    """A copy of a classifier whose logits are `weight @ features`; adapters are merged into it.

    Args:
        model: A sequence classifier, PEFT-wrapped or not; left as it is.
        weight: (num_labels, n_features).

    Returns:
        A stock model of the same class with `num_labels = len(weight)`, in evaluation mode, in the model's dtype but
        for the head of a half-precision model, which stays a rounding of `weight`.

    Raises:
        RewardModelError: If the head takes another number of features.
    """
    fresh: Any = copy.deepcopy(model)
    if hasattr(fresh, "merge_and_unload"):
        fresh = fresh.merge_and_unload()
    name, head = score_head(fresh)
    if weight.shape[1] != head.in_features:
        raise RewardModelError(
            f"A head of {weight.shape[1]} features does not fit {type(fresh).__name__}, whose head takes "
            f"{head.in_features}: the reward basis was fitted on features of another model."
        )
    new = nn.Linear(head.in_features, len(weight), bias=head.bias is not None)
    new = new.to(device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if new.bias is not None:
            new.bias.zero_()  # the same for every text, so it cancels in every comparison
    fresh.set_submodule(name, new)
    fresh.config.num_labels = len(weight)
    if hasattr(fresh, "num_labels"):
        fresh.num_labels = len(weight)
    return fresh.eval()
