"""Paired directions: every update as a weighted sum of the same K rank-one matrices, one number per update and pair."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Stacks
from eigenpeft.linalg.orthogonal import fix_signs, unit_rows

RIDGE = 1e-8
"""Added to the normal equations, relative to their mean diagonal: keeps nearly parallel pairs from cancelling each other."""
_MAX_SWEEPS = 500
# A sweep gains little long before the fit is done ("swamps"), so that it goes on until gains are far below the tolerance.
_PATIENCE = 1e-2


@dataclass(frozen=True)
class Pairs:
    """K pairs of directions, those with the largest coefficients first.

    Attributes:
        components_in: Rows of unit norm in the input space, not orthogonal.
        components_out: Rows of unit norm in the output space, not orthogonal; row k belongs to row k of the input side.
        coefficients: d of every adapter.
        loss: `Σ ω²‖ΔW - P_outᵀ diag(d) P_in‖²`.
    """

    components_in: Float[Tensor, "k n"]
    components_out: Float[Tensor, "k m"]
    coefficients: Float[Tensor, "t k"]
    loss: float


def pair_gram(components_out: Float[Tensor, "k m"], components_in: Float[Tensor, "k n"]) -> Float[Tensor, "k k"]:
    """Inner products of the rank-one matrices `p_out,k p_in,kᵀ`: `(P_out P_outᵀ) ∘ (P_in P_inᵀ)`, float64.

    Args:
        components_out: P_out.
        components_in: P_in.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> pair_gram(rows, rows).round(decimals=4)
        tensor([[1.0000, 0.3600],
                [0.3600, 1.0000]], dtype=torch.float64)
    """
    p_out, p_in = components_out.to(torch.float64), components_in.to(torch.float64)
    return (p_out @ p_out.mT) * (p_in @ p_in.mT)


def pair_coefficients(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    components_out: Float[Tensor, "k m"],
    components_in: Float[Tensor, "k n"],
) -> Float[Tensor, " k"]:
    """The d of the nearest `P_outᵀ diag(d) P_in` to `B A`.

    The scaling of JD-Diag ("Compress then Serve", arXiv 2407.00066, appendix A.1, case 2):
    `d = ((P_outP_outᵀ) ∘ (P_inP_inᵀ))⁻¹ diag(P_out B A P_inᵀ)`; on orthonormal rows the diagonal itself.

    Args:
        lora_B: Left factor, scaling included.
        lora_A: Right factor.
        components_out: P_out, rows of unit norm.
        components_in: P_in, rows of unit norm.

    Returns:
        d, float64.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> pair_coefficients(3 * eye, eye, components_out=eye[:1], components_in=eye[:1]).round(decimals=6).tolist()
        [3.0]
    """
    p_out, p_in = components_out.to(torch.float64), components_in.to(torch.float64)
    products = (p_out @ lora_B.to(torch.float64)) * (lora_A.to(torch.float64) @ p_in.mT).mT
    return _solve(pair_gram(p_out, p_in), products.sum(dim=1)[:, None])[:, 0]


def pair_curve(
    stacks: Stacks, components_in: Float[Tensor, "k n"], components_out: Float[Tensor, "k m"]
) -> Float[Tensor, " k"]:
    """Share of the stacks' squared norm that the first 1, 2, ..., K pairs hold, each with coefficients of its own.

    Args:
        stacks: Rows of the adapters.
        components_in: P_in, rows of unit norm.
        components_out: P_out, as many rows as P_in.

    Returns:
        The share for K = 1, 2, ..., float64. It rises with K; only the ridge of the solve can make it fall, by about 1e-8.
    """
    p_out, p_in = components_out.to(torch.float64), components_in.to(torch.float64)
    products, gram = _products(_rows(stacks), p_in, p_out), pair_gram(p_out, p_in)
    losses = [
        _loss(stacks, products[:, :k], gram[:k, :k], _solve(gram[:k, :k], products[:, :k].mT).mT)
        for k in range(1, len(gram) + 1)
    ]
    return 1.0 - torch.tensor(losses, dtype=torch.float64) / stacks.squared_norm


def fit_pairs(
    stacks: Stacks, starts: Iterable[tuple[Float[Tensor, "k n"], Float[Tensor, "k m"]]], *, tol: float
) -> Pairs:
    """Pairs of the least `Σ ω²‖ΔW - P_outᵀ diag(d) P_in‖²` found from several starts, by alternating least squares.

    A canonical polyadic decomposition of the stack of updates (Carroll and Chang, Psychometrika 35, 1970; JD-Diag of arXiv
    2407.00066, appendix A.1, case 2). Each step solves the normal equations of d, of P_out or of P_in exactly, with a ridge of
    1e-8: `P_outᵀ <- (Σ ΔW P_inᵀ D)(Σ D P_inP_inᵀ D)⁻¹`. The best pairs of all sweeps are kept, so that the result is at least
    as good as the best start. A sweep costs four products of a stack with K rows, and no (out, in) matrix is formed.

    Args:
        stacks: Rows of the adapters.
        starts: Pairs to start from, `(P_in, P_out)`.
        tol: Stop when a sweep gains less than a hundredth of this share of the squared norm; after 500 sweeps in any case.

    Returns:
        `Pairs`, float64.

    Example:
        >>> import torch
        >>> from eigenpeft.linalg.bases.stacking import stack_factors
        >>> eye = torch.eye(3)
        >>> stacks = stack_factors([(3 * eye[:, :1], eye[:1])], rows="balanced", weighting="none")
        >>> pairs = fit_pairs(stacks, [leading_pairs(stacks, 1)], tol=1e-4)
        >>> pairs.components_in.abs().round(decimals=4)
        tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    rows = _rows(stacks)
    # The pairs lie in the span of the rows, where there are often far fewer coordinates than features.
    axes_in, axes_out = _axes(rows.rows_in), _axes(rows.rows_out)
    small = Stacks(
        rows_in=_on(axes_in, rows.rows_in),
        rows_out=_on(axes_out, rows.rows_out),
        middle=rows.middle,
        sizes=stacks.sizes,
        squared_norm=stacks.squared_norm,
        norms=stacks.norms,
    )
    found = [
        _alternate(small, _on(axes_in, p_in.to(torch.float64)), _on(axes_out, p_out.to(torch.float64)), tol=tol)
        for p_in, p_out in starts
    ]
    best = min(found, key=lambda pairs: pairs.loss)
    order = best.coefficients.square().sum(dim=0).argsort(descending=True, stable=True)
    components_in = fix_signs(_back(axes_in, best.components_in[order]))
    components_out = fix_signs(_back(axes_out, best.components_out[order]))
    products = _products(rows, components_in, components_out)
    gram = pair_gram(components_out, components_in)
    coefficients = _solve(gram, products.mT).mT
    return Pairs(components_in, components_out, coefficients, _loss(stacks, products, gram, coefficients))


def paired_shares(stacks: Stacks, counts: Iterable[int], *, tol: float) -> dict[int, float]:
    """Number of pairs to the share of the stacks' squared norm that as many hold, fitted for each number from one start.

    Args:
        stacks: Rows of "moments".
        counts: Numbers of pairs; those of which there are no so many rows are left out.
        tol: As of `fit_pairs`. One start, the leading triplets, makes each share a lower bound of what three starts find.
    """
    possible = [count for count in counts if count <= len(stacks.rows_in)]
    return {
        count: 1.0 - fit_pairs(stacks, [leading_pairs(stacks, count)], tol=tol).loss / stacks.squared_norm
        for count in possible
    }


def leading_pairs(stacks: Stacks, n_pairs: int) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k m"]]:
    """The leading singular triplets of all updates taken together, as a start.

    Args:
        stacks: Rows of "moments": one row per triplet, whose norm is the singular value.
        n_pairs: K, at most the number of rows.
    """
    largest = stacks.rows_in.to(torch.float64).norm(dim=1).argsort(descending=True, stable=True)[:n_pairs]
    return unit_rows(stacks.rows_in[largest].double()), unit_rows(stacks.rows_out[largest].double())


def _alternate(
    stacks: Stacks, components_in: Float[Tensor, "k n"], components_out: Float[Tensor, "k m"], *, tol: float
) -> Pairs:
    places, middle = _places(stacks), stacks.middle[:, None]
    p_in, p_out = unit_rows(components_in.double()), unit_rows(components_out.double())
    best: Pairs | None = None
    last = float("inf")
    for _ in range(_MAX_SWEEPS):
        on_in = stacks.rows_in @ p_in.mT
        products = _summed(stacks, on_in * middle * (stacks.rows_out @ p_out.mT))
        gram_in, gram_out = p_in @ p_in.mT, p_out @ p_out.mT
        gram = gram_in * gram_out
        coefficients = _solve(gram, products.mT).mT
        loss = _loss(stacks, products, gram, coefficients)
        if best is None or loss < best.loss:
            best = Pairs(p_in, p_out, coefficients, loss)
        if last - loss <= _PATIENCE * tol * stacks.squared_norm:
            break
        last = loss

        weights = on_in * middle * coefficients[places]
        p_out, lengths = _updated(gram_in * (coefficients.mT @ coefficients), weights.mT @ stacks.rows_out, p_out)
        coefficients = coefficients * lengths
        weights = (stacks.rows_out @ p_out.mT) * middle * coefficients[places]
        gram = (p_out @ p_out.mT) * (coefficients.mT @ coefficients)
        p_in, _ = _updated(gram, weights.mT @ stacks.rows_in, p_in)
    assert best is not None
    return best


def _updated(
    gram: Float[Tensor, "k k"], moments: Float[Tensor, "k n"], old: Float[Tensor, "k n"]
) -> tuple[Float[Tensor, "k n"], Float[Tensor, " k"]]:
    """New rows of unit norm and their lengths; a row that nothing uses stays what it was."""
    rows = _solve(gram, moments)
    lengths = rows.norm(dim=1)
    used = lengths > torch.finfo(torch.float64).tiny ** 0.5
    return torch.where(used[:, None], rows / lengths.clamp(min=1e-300)[:, None], old), torch.where(used, lengths, 1.0)


def _solve(gram: Float[Tensor, "k k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    diagonal = gram.diagonal()
    ridge = RIDGE * diagonal.mean().clamp(min=1e-300)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right)


def _rows(stacks: Stacks) -> Stacks:
    fields = {name: getattr(stacks, name).to(torch.float64) for name in ("rows_in", "rows_out", "middle")}
    return Stacks(**fields, sizes=stacks.sizes, squared_norm=stacks.squared_norm, norms=stacks.norms)


def _places(stacks: Stacks) -> Tensor:
    sizes = torch.tensor(stacks.sizes, device=stacks.rows_in.device)
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)


def _summed(stacks: Stacks, rows: Float[Tensor, "p k"]) -> Float[Tensor, "t k"]:
    """The sum of each adapter's rows."""
    return rows.new_zeros(len(stacks.sizes), rows.shape[1]).index_add(0, _places(stacks), rows)


def _products(
    stacks: Stacks, components_in: Float[Tensor, "k n"], components_out: Float[Tensor, "k m"]
) -> Float[Tensor, "t k"]:
    """`diag(P_out (ω ΔW) P_inᵀ)` of every adapter."""
    on_out = stacks.middle[:, None] * (stacks.rows_out @ components_out.mT)
    return _summed(stacks, (stacks.rows_in @ components_in.mT) * on_out)


def _loss(
    stacks: Stacks, products: Float[Tensor, "t k"], gram: Float[Tensor, "k k"], coefficients: Float[Tensor, "t k"]
) -> float:
    held = 2.0 * (coefficients * products).sum() - (coefficients * (coefficients @ gram)).sum()
    return stacks.squared_norm - float(held)


def _axes(rows: Float[Tensor, "p n"]) -> Float[Tensor, "q n"] | None:
    """Orthonormal axes of the rows; None where there are no fewer of them than features."""
    return torch.linalg.qr(rows.mT).Q.mT if len(rows) < rows.shape[1] else None


def _on(axes: Float[Tensor, "q n"] | None, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k q"]:
    return rows if axes is None else rows @ axes.mT


def _back(axes: Float[Tensor, "q n"] | None, rows: Float[Tensor, "k q"]) -> Float[Tensor, "k n"]:
    return unit_rows((rows if axes is None else rows @ axes).double())
