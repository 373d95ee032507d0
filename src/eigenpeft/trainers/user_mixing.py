"""User weights inside a stock classifier: an extra embedding, and hooks that mix its logits by user."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.linalg.preference.objective import simplex
from eigenpeft.reward.text.backbone import score_head

# Name of the embedding in the model: it is trained, saved in checkpoints and wrapped by PEFT under it.
USER_LOGITS = "lore_user_logits"


class UserMixing:
    """Lets a classifier of n_basis labels take `user_rows` and return one mixed logit per text.

    A forward pre-hook takes `user_rows` (batch,) out of the arguments, a forward hook turns logits (2 batch, n_basis)
    of chosen and rejected texts into (2 batch, 1). Row -1 is the mean of all users. The class of the model, and so
    what it saves as, stays what it is; all happens inside the call, so that DDP and PEFT see it.

    Args:
        model: Sequence classifier, not PEFT-wrapped yet.
        n_users: Number of users.
        n_basis: Its number of labels.
    """

    def __init__(self, model: nn.Module, *, n_users: int, n_basis: int):
        logits = nn.Embedding(n_users, n_basis)
        nn.init.zeros_(logits.weight)
        model.add_module(USER_LOGITS, logits.to(next(model.parameters()).device))
        model.register_forward_pre_hook(self._take, with_kwargs=True)
        model.register_forward_hook(self._mix)
        self._rows: Tensor | None = None
        self.basis_logits = torch.zeros(0, n_basis)
        """(2 batch, n_basis) of the last call with users, without gradients."""

    def _take(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        keywords = dict(keywords)
        self._rows = keywords.pop("user_rows", None)
        return arguments, keywords

    def _mix(self, module: nn.Module, arguments: tuple, outputs: Any) -> Any:
        if self._rows is not None:
            weights = weights_of(module, self._rows.repeat(2))
            self.basis_logits = outputs.logits.detach()
            outputs.logits = (outputs.logits * weights.to(outputs.logits)).sum(dim=1, keepdim=True)
        return outputs


def bare_copy(model: Any) -> Any:
    """A copy without users and hooks, adapters merged: a stock classifier again.

    Args:
        model: With `UserMixing`, PEFT-wrapped or not.
    """
    copied = copy.deepcopy(model)
    if hasattr(copied, "merge_and_unload"):
        copied = copied.merge_and_unload()
    delattr(copied, USER_LOGITS)
    for hooks in (copied._forward_hooks, copied._forward_pre_hooks, copied._forward_pre_hooks_with_kwargs):
        hooks.clear()
    return copied


def keep_head_precise(model: Any) -> None:
    """Train the head of a half-precision model in float32: steps of 1e-4 are lost in the rounding of its weights.

    Args:
        model: Sequence classifier, not PEFT-wrapped yet (PEFT's copy of the head then is precise too).

    Raises:
        RewardModelError: If the model has no linear head.
    """
    _, head = score_head(model)
    if head.weight.dtype in (torch.bfloat16, torch.float16):
        head.float()
        head.register_forward_pre_hook(_match_weight)


def release_head(model: Any) -> None:
    """What `keep_head_precise` did undone: the head in the dtype of the rest, without a hook.

    Args:
        model: Sequence classifier, adapters merged.

    Raises:
        RewardModelError: If the model has no linear head.
    """
    name, head = score_head(model)
    head._forward_pre_hooks.clear()
    head.to(next(tensor for other, tensor in model.named_parameters() if not other.startswith(name)).dtype)


def _match_weight(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].to(head.weight.dtype), *arguments[1:])  # pyright: ignore[reportArgumentType, reportCallIssue]


def weights_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Weights of users by number.

    Args:
        model: With `UserMixing`.
        rows: (n,) numbers; -1 for the mean of all users.

    Returns:
        (n, n_basis).
    """
    embedding = getattr(model, USER_LOGITS)
    weights = simplex(embedding(rows.clamp(min=0)))
    if bool((rows < 0).any()):
        weights = torch.where((rows < 0)[:, None], population_of(model), weights)
    return weights


@torch.no_grad()
def population_of(model: nn.Module) -> Tensor:
    """(n_basis,) mean weights of all users.

    Args:
        model: With `UserMixing`.
    """
    return simplex(user_logits(model)).mean(dim=0)


def user_logits(model: nn.Module) -> Tensor:
    """(n_users, n_basis) the trained logits, wherever PEFT keeps them.

    Args:
        model: With `UserMixing`.
    """
    embedding = getattr(model, USER_LOGITS)
    if hasattr(embedding, "modules_to_save"):  # PEFT's wrapper: the trained copy of the active adapter
        embedding = embedding.modules_to_save[embedding.active_adapter]
    return embedding.weight
