"""The update `y + x V_inᵀ Pᵀ V_out` of a linear map, forwards and backwards, by the cheapest order of products."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

MIN_WIDTH = 16
"""Matrix products narrower than this take as long as this wide."""
MAX_KEPT_RATIO = 4
"""Up to this K / r the components of the input are kept for the backward pass, never the input itself."""
FORM_FACTORS_FROM = 1.75
"""Factors of each member are formed from this multiple of the sequence length at which the multiply-adds are equal."""


class Route(NamedTuple):
    """For each of the four products with a wide matrix: on the factors A, B (width r), or on the components (width K)?

    Attributes:
        input_on_factor: `h = x Aᵀ`, which keeps x for the backward pass, instead of `p = x V_inᵀ`, which keeps p.
        output_on_factor: `y + h Bᵀ` instead of `y + (h C_outᵀ) V_out`.
        output_grad_on_factor: `gᵀ h` and `g B` instead of `g V_outᵀ`.
        input_grad_on_factor: `∂x = ∂h A` instead of `(∂h C_in) V_in`.
    """

    input_on_factor: bool
    output_on_factor: bool
    output_grad_on_factor: bool
    input_grad_on_factor: bool


CHAIN = Route(False, False, False, False)
COMPONENTS_KEPT = Route(False, True, True, True)
INPUT_KEPT = Route(True, True, True, True)


def choose_route(n_tokens: int, *, n_components: int, rank: int | None) -> Route:
    """The route with the fewest multiply-adds, subject to keeping little for the backward pass.

    Per feature of the wide side, with T tokens and r counted as at least `MIN_WIDTH`, a product on the components takes
    `T K`; on a factor it takes `T r` and `K r` to form the factor. The gradient at the output needs two products on the
    factor where one on the components does, and so does the input (one forwards, one backwards).

    Up to `K = 4 r` the input is always projected on the components: `T K` numbers are kept instead of `T n`, which costs
    at most a few per cent of the layer.

    Args:
        n_tokens: T, rows of x.
        n_components: K.
        rank: r; None for cores without one (a full or diagonal matrix on the components), which are chains.

    Returns:
        The route.

    Examples:
        >>> choose_route(4, n_components=32, rank=16) == CHAIN
        True
        >>> choose_route(4096, n_components=64, rank=16) == COMPONENTS_KEPT
        True
        >>> choose_route(4096, n_components=256, rank=16) == INPUT_KEPT
        True
    """
    if rank is None:
        return CHAIN
    once, twice = (
        factor_is_cheaper(n_tokens, n_components=n_components, rank=rank, n_products=count) for count in (1, 2)
    )
    return Route(twice and n_components > MAX_KEPT_RATIO * max(rank, MIN_WIDTH), once, twice, once)


def factor_is_cheaper(n_tokens: int, *, n_components: int, rank: int, n_products: int = 1) -> bool:
    """Whether products on a factor of width r, formed anew, take fewer multiply-adds than one on its K components.

    Args:
        n_tokens: T, rows of the other operand.
        n_components: K.
        rank: r.
        n_products: How many products on the factor take the place of one on the components.

    Examples:
        >>> factor_is_cheaper(4096, n_components=64, rank=16)
        True
    """
    return n_tokens * n_components > n_products * (n_tokens * max(rank, MIN_WIDTH) + n_components * rank)


def input_product(
    x: Float[Tensor, "*t n"],
    components_in: Float[Tensor, "k_in n"],
    coefficients_in: Float[Tensor, "r k_in"] | None,
    *,
    on_factor: bool,
) -> tuple[Float[Tensor, "*t r"], Float[Tensor, "*t w"]]:
    """`h = x V_inᵀ C_inᵀ`, computed as `x Aᵀ` with `A = C_in V_in` or as `(x V_inᵀ) C_inᵀ`.

    Args:
        x: Input.
        components_in: V_in.
        coefficients_in: C_in; None for the identity.
        on_factor: Whether to form A; this needs C_in.

    Returns:
        h, and what the backward pass needs: h again if A was formed (and x, which the caller has), else `x V_inᵀ`.
    """
    if on_factor:
        assert coefficients_in is not None
        hidden = linear(x, coefficients_in @ components_in)
        return hidden, hidden
    kept = linear(x, components_in)
    return (kept if coefficients_in is None else linear(kept, coefficients_in)), kept


def output_operands(
    hidden: Float[Tensor, "*t r"],
    coefficients_out: Float[Tensor, "k_out r"] | Float[Tensor, " k_out"],
    components_out: Float[Tensor, "k_out m"],
    *,
    on_factor: bool,
) -> tuple[Float[Tensor, "*t c"], Float[Tensor, "c m"]]:
    """Two matrices whose product is `h C_outᵀ V_out`: h and `C_outᵀ V_out = Bᵀ`, or `h C_outᵀ` and `V_out`.

    Args:
        hidden: h.
        coefficients_out: C_out; or the diagonal of a square one.
        components_out: V_out.
        on_factor: Whether to form B.
    """
    if on_factor:
        return hidden, coefficients_out.mT @ components_out
    return (
        hidden * coefficients_out if coefficients_out.ndim == 1 else linear(hidden, coefficients_out)
    ), components_out


def low_rank_update(
    y: Float[Tensor, "t m"],
    *,
    x: Float[Tensor, "t n"],
    components_in: Float[Tensor, "k_in n"],
    coefficients_in: Float[Tensor, "r k_in"] | None,
    coefficients_out: Float[Tensor, "k_out r"] | Float[Tensor, " k_out"],
    components_out: Float[Tensor, "k_out m"],
    route: Route,
    in_place: bool = False,
) -> tuple[Float[Tensor, "t m"], Float[Tensor, "t w"]]:
    """`y + x V_inᵀ C_inᵀ C_outᵀ V_out` and what the backward pass needs (EigenLoRAx, arXiv 2502.04700, equation 4).

    Args:
        y: What is updated.
        x: Input.
        components_in: V_in.
        coefficients_in: C_in; None for the identity.
        coefficients_out: C_out, any scaling included; or the diagonal of a square one.
        components_out: V_out.
        route: Order of the products; all give the same up to rounding.
        in_place: Write the sum over y.

    Returns:
        The sum, and what to keep for the backward pass: `x V_inᵀ`, or, with x itself, `x Aᵀ`.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> y, x = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
        >>> low_rank_update(
        ...     y,
        ...     x=x,
        ...     components_in=eye,
        ...     coefficients_in=3 * eye,
        ...     coefficients_out=eye,
        ...     components_out=eye,
        ...     route=CHAIN,
        ... )[0].tolist()
        [[3.0, 6.0]]
    """
    hidden, kept = input_product(x, components_in, coefficients_in, on_factor=route.input_on_factor)
    product = output_operands(hidden, coefficients_out, components_out, on_factor=route.output_on_factor)
    return (y.addmm_(*product) if in_place else torch.addmm(y, *product)), kept


def low_rank_update_grad(
    grad: Float[Tensor, "t m"],
    *,
    x: Float[Tensor, "t n"] | None,
    kept: Float[Tensor, "t w"],
    components_in: Float[Tensor, "k_in n"],
    coefficients_in: Float[Tensor, "r k_in"] | None,
    coefficients_out: Float[Tensor, "k_out r"] | Float[Tensor, " k_out"],
    components_out: Float[Tensor, "k_out m"],
    route: Route,
    needs_x: bool,
) -> tuple[
    Float[Tensor, "t n"] | None, Float[Tensor, "r k_in"] | None, Float[Tensor, "k_out r"] | Float[Tensor, " k_out"]
]:
    """Gradients of `low_rank_update` at x, C_in and C_out.

    Args:
        grad: Gradient g at the sum.
        x: Input; None unless the route takes the input on the factor.
        kept: As `low_rank_update` returned it.
        components_in: V_in.
        coefficients_in: C_in; None for the identity.
        coefficients_out: C_out, or its diagonal.
        components_out: V_out.
        route: The same as forwards.
        needs_x: Whether the gradient at x is wanted.

    Returns:
        `(grad_x or None, grad_coefficients_in or None, grad_coefficients_out)`.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> y, x = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
        >>> _, kept = low_rank_update(
        ...     y,
        ...     x=x,
        ...     components_in=eye,
        ...     coefficients_in=3 * eye,
        ...     coefficients_out=eye,
        ...     components_out=eye,
        ...     route=CHAIN,
        ... )
        >>> grad = torch.tensor([[1.0, 0.0]])
        >>> low_rank_update_grad(
        ...     grad,
        ...     x=None,
        ...     kept=kept,
        ...     components_in=eye,
        ...     coefficients_in=3 * eye,
        ...     coefficients_out=eye,
        ...     components_out=eye,
        ...     route=CHAIN,
        ...     needs_x=True,
        ... )[0].tolist()
        [[3.0, 0.0]]
    """
    hidden = kept if route.input_on_factor or coefficients_in is None else linear(kept, coefficients_in)
    if route.output_grad_on_factor:
        grad_coefficients_out = linear(components_out, hidden.mT @ grad)
        grad_hidden = linear(grad, coefficients_out.mT @ components_out)
    else:
        grad_core = linear(grad, components_out)
        if coefficients_out.ndim == 1:
            grad_coefficients_out, grad_hidden = (grad_core * hidden).sum(0), grad_core * coefficients_out
        else:
            grad_coefficients_out, grad_hidden = grad_core.mT @ hidden, grad_core @ coefficients_out
    grad_coefficients_in = None
    if coefficients_in is not None:
        grad_coefficients_in = linear(grad_hidden.mT @ x, components_in) if x is not None else grad_hidden.mT @ kept
    if not needs_x:
        return None, grad_coefficients_in, grad_coefficients_out
    if coefficients_in is None:
        grad_x = grad_hidden @ components_in
    elif route.input_grad_on_factor:
        grad_x = grad_hidden @ (coefficients_in @ components_in)
    else:
        grad_x = (grad_hidden @ coefficients_in) @ components_in
    return grad_x, grad_coefficients_in, grad_coefficients_out


def low_rank_updates(
    y: Float[Tensor, "b s m"],
    *,
    x: Float[Tensor, "b s n"],
    members: Int[Tensor, " b"],
    components_in: Float[Tensor, "k_in n"],
    coefficients_in: Float[Tensor, "u r k_in"],
    coefficients_out: Float[Tensor, "u k_out r"],
    components_out: Float[Tensor, "k_out m"],
    in_place: bool = False,
) -> Float[Tensor, "b s m"]:
    """`low_rank_update` with coefficients of its own for each sequence of a batch, without a loop.

    Short sequences stay on the components: one product with V_in for the whole batch, a gather of coefficients, two
    batched products of width K and r, one product with V_out. From `S > 1.75 r K / (K - r)` tokens on, it pays to form
    the factors of each sequence; 1 is where the multiply-adds are equal, 1.75 where the times were.

    Args:
        y: What is updated, S tokens per sequence.
        x: Input.
        members: Row of the coefficients that each sequence takes.
        components_in: V_in.
        coefficients_in: C_in of each member.
        coefficients_out: C_out of each member, any scaling included.
        components_out: V_out.
        in_place: Write the sum over y, which must be contiguous.

    Returns:
        The sum.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> x, twice = torch.ones(2, 1, 2), torch.stack([eye, 2 * eye])
        >>> low_rank_updates(
        ...     torch.zeros(2, 1, 2),
        ...     x=x,
        ...     members=torch.tensor([1, 0]),
        ...     components_in=eye,
        ...     coefficients_in=twice,
        ...     coefficients_out=torch.stack([eye, eye]),
        ...     components_out=eye,
        ... ).tolist()
        [[[2.0, 2.0]], [[1.0, 1.0]]]
    """
    (_, length, out_features), (rank, n_components) = y.shape, coefficients_in.shape[1:]
    gathered_in, gathered_out = coefficients_in[members], coefficients_out[members]  # (b, r, k), (b, k, r)
    if length * (n_components - rank) > FORM_FACTORS_FROM * rank * n_components:
        lora_A = (gathered_in.flatten(0, 1) @ components_in).unflatten(0, (-1, rank))
        lora_B = (gathered_out.mT.flatten(0, 1) @ components_out).unflatten(0, (-1, rank))
        hidden = x @ lora_A.mT
        return y.baddbmm_(hidden, lora_B) if in_place else torch.baddbmm(y, hidden, lora_B)
    projected = linear(x, components_in)
    core = projected @ gathered_in.mT @ gathered_out.mT
    product, flat = (core.flatten(0, 1), components_out), y.view(-1, out_features) if in_place else y.flatten(0, 1)
    return (flat.addmm_(*product) if in_place else torch.addmm(flat, *product)).view(y.shape)


def core_updates(
    y: Float[Tensor, "b s m"],
    projected: Float[Tensor, "b s k"],
    groups: Sequence[tuple[Int[Tensor, " _"] | None, tuple[Tensor, ...]]],
    *,
    components_out: Float[Tensor, "l m"],
    in_place: bool = False,
) -> Float[Tensor, "b s m"]:
    """`y + p M_iᵀ V_out` with a core M_i of its own, of any form, for each sequence of a batch.

    Args:
        y: What is updated, S tokens per sequence.
        projected: `p = x V_inᵀ`.
        groups: Sequences with cores of one form: their rows in the batch (None for all of it, in order) and the parts of
            their cores: C_in (g, r, K_in) and C_out (g, K_out, r); or M (g, K_out, K_in) alone; or the diagonal (g, K).
            Rows of no group are not updated.
        components_out: V_out.
        in_place: Write the sum over y, which must be contiguous.

    Returns:
        The sum.
    """
    core = projected.new_zeros(*projected.shape[:2], len(components_out))
    for rows, parts in groups:
        own = projected if rows is None else projected[rows]
        for part in parts:
            own = own * part[:, None] if part.ndim == 2 else own @ part.mT
        if rows is None:
            core = own
        else:
            core[rows] = own
    product, flat = (core.flatten(0, 1), components_out), y.view(-1, y.shape[2]) if in_place else y.flatten(0, 1)
    return (flat.addmm_(*product) if in_place else torch.addmm(flat, *product)).view(y.shape)
