"""The gradients of a new task's loss by the weights that adapters change, kept as token factors, before any training."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.scores.token_gradients import append_tokens

Tokens = dict[str, tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Any], Tensor]


def gather_tokens(
    model: nn.Module, *, targets: Mapping[str, nn.Module], batches: Iterable[Any], loss: Loss | None = None
) -> tuple[Tokens, int]:
    """Gather the gradient `G = ΔᵀX` of every target's weight over all batches, as its two factors.

    X (tokens, in_features) is the target's input and Δ (tokens, out_features) the gradient by its output, one row per token
    (backpropagation: `∂L/∂W = Σ_t δ_t x_tᵀ`); G is (out_features, in_features), in units of loss per unit of weight.

    Args:
        model: Base model with the task's head. It is left as it was; dropout is off.
        targets: Name to the linear module whose weight's gradient is wanted.
        batches: As the loss takes them.
        loss: Takes the model and a batch; default: `model(**batch).loss`.

    Returns:
        Name to (Δ, X), and the number of batches.

    Raises:
        SubspaceError: If no gradient reaches a target.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> tokens, n_batches = gather_tokens(
        ...     model, targets={"0": model[0]}, batches=[torch.ones(5, 3)], loss=lambda m, x: m(x).sum()
        ... )
        >>> (tokens["0"][0].T @ tokens["0"][1]).round().tolist(), n_batches
        ([[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]], 1)
    """
    loss = loss or (lambda model, batch: model(**batch).loss)
    tokens: Tokens = {}
    n_batches = 0
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            n_batches += 1
            with _watched(targets, tokens) as probes, torch.enable_grad():
                torch.autograd.grad(loss(model, batch), list(probes.values()), allow_unused=True)
    finally:
        for module, was in training:
            module.training = was
    if not tokens:
        raise SubspaceError(
            f"No gradient reached the {len(targets)} modules in {n_batches} batches; pass at least one batch whose loss "
            "depends on them."
        )
    return tokens, n_batches


@contextmanager
def _watched(targets: Mapping[str, nn.Module], tokens: Tokens) -> Iterator[dict[str, Tensor]]:
    """Hooks that add each call's tokens; a zero added to the output makes its gradient known, trainable or not."""
    handles, probes = [], {}
    for name, module in targets.items():
        parameter = next(module.parameters())
        probes[name] = torch.zeros((), device=parameter.device, requires_grad=True)

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, name: str = name) -> Tensor:
            x = inputs[0].detach().flatten(0, -2)  # (tokens, in_features)

            def add(gradient: Tensor) -> None:
                tokens[name] = append_tokens(tokens.get(name), gradient.detach().flatten(0, -2), x)

            watched = output + probes[name].to(output.dtype)
            watched.register_hook(add)
            return watched

        handles.append(module.register_forward_hook(watch))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()
