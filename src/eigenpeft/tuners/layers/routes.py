"""The update of a layer by coefficients on components, as one autograd function that keeps K numbers per token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from eigenpeft.linalg.layer_update import (
    Route,
    choose_route,
    low_rank_update,
    low_rank_update_grad,
    low_rank_updates,
)


def add_update(
    y: Tensor,
    x: Tensor,
    *,
    components_in: Tensor,
    coefficients_in: Tensor | None,
    coefficients_out: Tensor,
    components_out: Tensor,
    scaling: float | Tensor = 1.0,
    in_place: bool = False,
) -> Tensor:
    """`y + s · V_outᵀ C_out C_in V_in x`, by the route that `choose_route` picks for the number of tokens.

    Computed in the dtype of x, or that of autocast where it is on. Differentiable once, in y, x and the coefficients; the
    components are frozen.

    Args:
        y: Output of the base layer, (..., out_features).
        x: Its input, (..., in_features).
        components_in: V_in, (n_components, in_features).
        coefficients_in: C_in, (r, n_components); None for the identity.
        coefficients_out: C_out, (n_components, r); or (n_components,), the diagonal of a square matrix.
        components_out: V_out, (n_components, out_features).
        scaling: s.
        in_place: Without gradients, write over y, which nothing else may be using (`owns_output`).

    Returns:
        The sum, of y's shape, in the dtype of the computation.
    """
    dtype = compute_dtype(x)
    if not (isinstance(scaling, float | int) and scaling == 1):
        coefficients_out = coefficients_out * scaling
    rank = None if coefficients_in is None else len(coefficients_in)
    n_tokens = x.numel() // x.shape[-1]
    route = choose_route(n_tokens, n_components=len(components_in), rank=rank)
    flat_y, flat_x = (side.to(dtype).reshape(n_tokens, side.shape[-1]) for side in (y, x))
    components_in, components_out = components_in.to(dtype), components_out.to(dtype)
    coefficients_in = None if coefficients_in is None else coefficients_in.to(dtype)
    coefficients_out = coefficients_out.to(dtype)
    if torch.is_grad_enabled():
        output, _ = _LowRankUpdate.apply(  # pyright: ignore[reportGeneralTypeIssues]
            flat_y, flat_x, components_in, coefficients_in, coefficients_out, components_out, route
        )
    else:
        output, _ = low_rank_update(
            flat_y,
            x=flat_x,
            components_in=components_in,
            coefficients_in=coefficients_in,
            coefficients_out=coefficients_out,
            components_out=components_out,
            route=route,
            in_place=in_place,
        )
    return output.view(y.shape)


def add_updates(
    y: Tensor,
    x: Tensor,
    members: Tensor,
    *,
    components_in: Tensor,
    coefficients_in: Tensor,
    coefficients_out: Tensor,
    components_out: Tensor,
    in_place: bool = False,
) -> Tensor:
    """`add_update` for a batch whose sequences belong to different members.

    Args:
        y: Output of the base layer, (batch, ..., out_features).
        x: Its input, (batch, ..., in_features).
        members: (batch,), row of the coefficients that each sequence takes.
        components_in: V_in, (n_components, in_features).
        coefficients_in: C_in of each member, (n_members, r, n_components).
        coefficients_out: C_out of each member, (n_members, n_components, r), scaling included.
        components_out: V_out, (n_components, out_features).
        in_place: Without gradients, write over y, which nothing else may be using (`owns_output`).

    Returns:
        The sum, of y's shape, in the dtype of the computation.
    """
    dtype = compute_dtype(x)
    wide_y, wide_x = (side.to(dtype).reshape(len(side), -1, side.shape[-1]) for side in (y, x))
    return low_rank_updates(
        wide_y,
        x=wide_x,
        members=members,
        components_in=components_in.to(dtype),
        coefficients_in=coefficients_in.to(dtype),
        coefficients_out=coefficients_out.to(dtype),
        components_out=components_out.to(dtype),
        in_place=in_place and not torch.is_grad_enabled(),
    ).view(y.shape)


def owns_output(layer: nn.Module, *, n_hooks: int = 0) -> bool:
    """Whether the output that `layer` has just returned can be written over: nothing else can have seen it.

    Linear layers and Conv1D make it anew; hooks may have kept it, and a compiler makes its own arrangements.

    Args:
        layer: Base layer.
        n_hooks: How many of its hooks are the caller's own.
    """
    seen = len(layer._forward_hooks) > n_hooks or torch_module._global_forward_hooks
    return type(layer) in (nn.Linear, Conv1D) and not seen and not torch.compiler.is_compiling()


class _LowRankUpdate(torch.autograd.Function):
    """`low_rank_update`; what it keeps is an output too, so that `torch.func` can see it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor,
        x: Tensor,
        components_in: Tensor,
        coefficients_in: Tensor | None,
        coefficients_out: Tensor,
        components_out: Tensor,
        route: Route,
    ) -> tuple[Tensor, Tensor]:
        return low_rank_update(
            y,
            x=x,
            components_in=components_in,
            coefficients_in=coefficients_in,
            coefficients_out=coefficients_out,
            components_out=components_out,
            route=route,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, matrices, ctx.route = inputs[1], inputs[2:6], inputs[6]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.route.input_on_factor else None, output[1], *matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_kept: None) -> tuple[Tensor | None, ...]:
        needs_y, needs_x, _, needs_in, needs_out, *_ = ctx.needs_input_grad
        if grad is None or not (needs_x or needs_in or needs_out):
            return (grad, *(None,) * 6)
        x, kept, components_in, coefficients_in, coefficients_out, components_out = ctx.saved_tensors
        grad_x, grad_in, grad_out = low_rank_update_grad(
            grad,
            x=x,
            kept=kept,
            components_in=components_in,
            coefficients_in=coefficients_in,
            coefficients_out=coefficients_out,
            components_out=components_out,
            route=ctx.route,
            needs_x=needs_x,
        )
        return grad if needs_y else None, grad_x, None, grad_in, grad_out, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which updates are computed: that of the input, or of autocast where it is on.

    Args:
        x: Input of the layer, (..., in_features).
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
