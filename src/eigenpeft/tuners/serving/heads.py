"""Heads of many members in one batch: each row gets the logits of its own member's head."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eigenpeft.collection.formats.keys import canonical_module, natural_order
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import AdapterMember
from eigenpeft.tuners.serving.blocks import Choice

State = Mapping[str, Tensor]
"""Parameters of one module by name in it."""
_STACKED_NUMBERS = 1 << 24  # linear heads of a batch are stacked up to this size, and called one by one above it


def heads_of(name: str, member: AdapterMember) -> dict[str, dict[str, Tensor]]:
    """The modules that a member trained in full, by path in its own model, each with its parameters.

    Args:
        name: What messages call the member.
        member: The member.

    Raises:
        SubspaceError: If it trained something that cannot be served row by row; the message names it.
    """
    saved = tuple(member.config.get("modules_to_save") or ())
    heads: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in member.kept_aside.items():
        parts = canonical_module(key).split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts)))
        path = next((path for path in paths if any(path == one or path.endswith(f".{one}") for one in saved)), None)
        if path is None:
            others.append(key)
        else:
            heads.setdefault(path, {})[".".join(parts)[len(path) + 1 :]] = tensor
    if member.config.get("alora_invocation_tokens"):
        others.append("alora_invocation_tokens")
    if others:
        raise SubspaceError(
            f"{name!r} trained more than updates and heads, {', '.join(map(repr, sorted(others, key=natural_order)[:3]))}"
            f"{', ...' if len(others) > 3 else ''}, which a bank cannot serve row by row. Leave it out (names=), or export "
            "it and serve it on a model of its own."
        )
    return heads


def check_head(name: str, *, path: str, state: State, module: nn.Module) -> None:
    """Refuse a head that does not fit the model's module of that name.

    Args:
        name: Member.
        path: Path of the head.
        state: Its parameters.
        module: The model's module.

    Raises:
        SubspaceError: If it has other parameters, or they are for inputs of another width.
    """
    own = dict(module.state_dict())
    fits = set(state) == set(own) and all(
        tensor.ndim == own[key].ndim and tensor.shape[1:] == own[key].shape[1:] for key, tensor in state.items()
    )
    if not fits:
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        expected = {key: tuple(tensor.shape) for key, tensor in own.items()}
        raise SubspaceError(
            f"The head {path!r} of {name!r} has the parameters {shapes}, and that of the model has {expected}. Attach the "
            "bank to a model of the class that the adapters were trained on."
        )


def head_outputs(
    module: nn.Module, *, x: Tensor, output: Tensor, states: Sequence[State | None], choice: Choice
) -> tuple[Tensor, list[int]]:
    """Outputs of each row's own head, padded with -inf to the widest.

    Args:
        module: The model's own head.
        x: Its input, (batch, ..., in_features), one row per member.
        output: What it returned, (batch, ..., width); rows without a state keep it.
        states: Parameters that replace the module's own, by row; None for rows that use the module as it is.
        choice: Choice of the batch; keeps the heads of its rows together.

    Returns:
        (batch, ..., width), and the width of each row.
    """
    if type(module) is nn.Linear:
        widths = [output.shape[-1] if state is None else len(state["weight"]) for state in states]
        if len(states) * max(widths) * x.shape[-1] <= _STACKED_NUMBERS:
            key = id(module), x.device, x.dtype
            weights, biases = choice.cached(key, lambda: _stacked(module, x, states, max(widths)))
            wide = x.reshape(len(x), -1, x.shape[-1])
            return torch.baddbmm(biases, wide, weights.mT).reshape(*x.shape[:-1], max(widths)), widths
    groups: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(id(state), []).append(row)
    outputs, widths = [], [0] * len(states)
    for rows in groups.values():
        state = states[rows[0]]
        if state is None:
            outputs.append(output[rows])
        else:
            moved = {key: tensor.to(device=x.device, dtype=output.dtype) for key, tensor in state.items()}
            outputs.append(functional_call(module, moved, (x[rows],)))
        for row in rows:
            widths[row] = outputs[-1].shape[-1]
    padded = output.new_full((*output.shape[:-1], max(widths)), float("-inf"))
    for rows, own in zip(groups.values(), outputs, strict=True):
        padded[rows, ..., : own.shape[-1]] = own
    return padded, widths


def listed(output: Any, choice: Choice) -> Any:
    """A model's output with its padded logits as a list, one tensor of its own width per row.

    Args:
        output: What the model returned.
        choice: Choice of the batch, with the widths that its head had.
    """
    widths = choice.widths
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if widths is None or not isinstance(logits, Tensor) or logits.shape[-1] != max(widths):
        return output
    rows = [row[..., :width] for row, width in zip(logits, widths, strict=True)]
    if isinstance(output, tuple):
        return (rows, *output[1:])
    output.logits = rows
    return output


def _stacked(module: nn.Module, x: Tensor, states: Sequence[State | None], width: int) -> tuple[Tensor, Tensor]:
    """Weights (batch, width, in_features) and biases (batch, 1, width) of a linear head, -inf where a row's head ends."""
    own: Any = module
    weights, biases = x.new_zeros(len(states), width, x.shape[-1]), x.new_full((len(states), 1, width), float("-inf"))
    for row, state in enumerate(states):
        weight, bias = (own.weight, own.bias) if state is None else (state["weight"], state.get("bias"))
        weights[row, : len(weight)] = weight
        biases[row, 0, : len(weight)] = 0.0 if bias is None else bias
    return weights, biases
