"""Sequence-classification backbones: where their head is, and copies of them with another one."""

import copy
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from eigenpeft.errors import RewardModelError

# Where Transformers keeps the last linear layer of a sequence classifier, decoder style first.
_HEADS = ("score", "classifier.out_proj", "classifier.dense_out", "classifier")


def head_module(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of what makes the logits, as it stands in the model: a linear layer, or PEFT's wrapper of one.

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
        if isinstance(_linear(head), nn.Linear):
            return name, head
    raise RewardModelError(
        f"{type(base).__name__} has no linear head named {', '.join(_HEADS)}; load the backbone with "
        "AutoModelForSequenceClassification."
    )


def score_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name and the linear layer of the head that makes the logits.

    Where PEFT trains the head (`modules_to_save`), this is the trained copy of the active adapter.

    Args:
        model: An `AutoModelForSequenceClassification` model, PEFT-wrapped or not.

    Raises:
        RewardModelError: If there is none where Transformers' models have it.
    """
    name, head = head_module(model)
    return name, cast(nn.Linear, _linear(head))


def head_weight(model: nn.Module) -> Tensor:
    """(num_labels, n_features), float32 on the CPU: the head's weight with the active adapters' updates of it.

    Args:
        model: A sequence classifier, PEFT-wrapped or not.

    Raises:
        RewardModelError: If it has no linear head.
    """
    _, head = head_module(model)
    weight = cast(nn.Linear, _linear(head)).weight.detach().float().cpu()
    if isinstance(head, BaseTunerLayer) and not head.merged and not head.disable_adapters:
        updates = (head.get_delta_weight(name) for name in head.active_adapters)  # pyright: ignore[reportCallIssue]
        weight = weight + sum(update.detach().float().cpu() for update in updates)
    return weight


def reference_head(model: nn.Module) -> Tensor:
    """The head of a scalar reward model as a vector: the reference direction of a fit on its features.

    Args:
        model: A sequence classifier with one label.

    Returns:
        (n_features,) float32.

    Raises:
        RewardModelError: If it has several labels, or no linear head.
    """
    weight = head_weight(model)
    if len(weight) != 1:
        raise RewardModelError(
            f"The model's head has {len(weight)} labels; a reference reward has 1. Pass reference_head=None to fit "
            "without one."
        )
    return weight[0]


def _linear(head: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrappers: the active adapter's trained copy, or what LoRA adapts."""
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
        head = head.modules_to_save[names[0]] if names else head.original_module
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


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
