"""What the others' subspace holds of an adapter: leave-one-out curves from one decomposition, without refitting."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.stacking import Stacks

# Coordinates kept for the downdates: enough to be exact for most collections, few enough for an eigenproblem each.
_WIDTH = 256
_SPARE = 32
# Eigenvalues of a downdated moment below this share of the whole moment are rounding, or directions that only the adapters
# left out have: counting those would explain an adapter by itself.
_NOISE = 1e-10


@dataclass(frozen=True)
class HeldOut:
    """Cumulative shares of each adapter's `‖ω ΔW‖²` for K = 1, 2, ... components fitted without it.

    Attributes:
        both: Inside the subspaces of both sides, `‖V_out ΔW V_inᵀ‖²`.
        inside: With the input side projected alone, `‖ΔW V_inᵀ‖²`: what a common lora_A gives.
    """

    both: Float[Tensor, "n_adapters k"]
    inside: Float[Tensor, "n_adapters k"]


def held_out_curves(
    stacks: Stacks, *, n_components: int, groups: Sequence[Hashable] | None = None, generator: Generator | None = None
) -> HeldOut:
    """Share of each `‖ω ΔW_i‖²` that K = 1, 2, ... components explain which were fitted without adapter i.

    The stacks are decomposed once. In the coordinates of their leading L components (at least 256), leaving adapters out
    subtracts their rows' moment: `M₋ᵢ = D² - Z_iᵀ Z_i`, an L x L eigenproblem each. Exact where L reaches the rank of the
    stack; beyond that a little too high, since the L directions were chosen with the adapter among the others.

    Args:
        stacks: Rows of the adapters, balanced or of second moments.
        n_components: Largest K.
        groups: A label for each adapter of the stacks; adapters of one label are left out together. None: each alone.
        generator: Source of the iterative solver's start.

    Returns:
        `HeldOut`, float64, 0 where nothing is left to fit.

    Raises:
        ValueError: If `groups` has another length than there are adapters in the stacks.
    """
    labels = list(groups) if groups is not None else list(range(len(stacks.sizes)))
    if len(labels) != len(stacks.sizes):
        raise ValueError(f"groups has {len(labels)} labels for {len(stacks.sizes)} adapters; pass one each.")
    sides = []
    for rows in (stacks.rows_in, stacks.rows_out):
        width = min(*rows.shape, max(_WIDTH, n_components + 2 * max(stacks.sizes) + _SPARE))
        found = leading_components(rows, n_components=width, generator=generator)
        sides.append((rows @ found.components.to(rows.dtype).mT).to(torch.float64))
    coordinates_in, coordinates_out = sides
    grams = _output_grams(stacks)
    both, inside = (torch.zeros(len(labels), n_components, dtype=torch.float64) for _ in range(2))
    steps = torch.arange(n_components)
    parts_in, parts_out = coordinates_in.split(stacks.sizes), coordinates_out.split(stacks.sizes)
    middles = stacks.middle.to(torch.float64).split(stacks.sizes)
    moments = coordinates_in.mT @ coordinates_in, coordinates_out.mT @ coordinates_out
    for label in dict.fromkeys(labels):
        left_out = [i for i, other in enumerate(labels) if other == label]
        basis_in, basis_out = (
            _leading(
                moment - torch.stack([parts[i].mT @ parts[i] for i in left_out]).sum(dim=0),
                n_components,
                noise=_NOISE * float(moment.trace()),
            )
            for moment, parts in zip(moments, (parts_in, parts_out), strict=True)
        )
        for i, (gram, energy) in ((i, grams[i]) for i in left_out):
            coefficients_in = parts_in[i] @ basis_in
            core = (middles[i][:, None] * (parts_out[i] @ basis_out)).mT @ coefficients_in
            explained = core.square().cumsum(0).cumsum(1)
            k_out, k_in = explained.shape
            if k_out and k_in:
                one_sided = (coefficients_in * (gram @ coefficients_in)).sum(dim=0).cumsum(0)
                both[i] = explained[steps.clamp(max=k_out - 1), steps.clamp(max=k_in - 1)] / energy
                inside[i] = one_sided[steps.clamp(max=k_in - 1)] / energy
    return HeldOut(both, inside)


def _leading(moment: Float[Tensor, "l l"], n_components: int, *, noise: float) -> Float[Tensor, "l k"]:
    """Eigenvectors of the largest eigenvalues as columns, without those of noise."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0)[:n_components], vectors.flip(1)[:, :n_components]
    return vectors[:, values > noise]


def _output_grams(stacks: Stacks) -> list[tuple[Tensor, float]]:
    """`diag(middle) rows_out rows_outᵀ diag(middle)` and `‖ω ΔW_i‖²` of every adapter."""
    result = []
    parts = zip(*(x.split(stacks.sizes) for x in (stacks.rows_in, stacks.rows_out, stacks.middle)), strict=True)
    for rows_in, rows_out, middle in parts:
        wide_in, wide_out = rows_in.to(torch.float64), middle.to(torch.float64)[:, None] * rows_out.to(torch.float64)
        gram = wide_out @ wide_out.mT
        result.append((gram, float(((wide_in @ wide_in.mT) * gram).sum())))
    return result


def cosines(stacks: Stacks) -> Float[Tensor, "n_adapters n_adapters"]:
    """`⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)` of every pair, from the Gram matrices of the rows.

    Args:
        stacks: Rows of the adapters.

    Returns:
        Symmetric, ones on the diagonal, float64.
    """
    rows_in = stacks.rows_in.to(torch.float64)
    rows_out = stacks.middle.to(torch.float64)[:, None] * stacks.rows_out.to(torch.float64)
    products = (rows_in @ rows_in.mT) * (rows_out @ rows_out.mT)
    blocks = [[block.sum() for block in row.split(stacks.sizes, dim=1)] for row in products.split(stacks.sizes, dim=0)]
    inner = torch.tensor([[float(value) for value in row] for row in blocks], dtype=torch.float64)
    lengths = inner.diagonal().sqrt()
    return inner / (lengths[:, None] * lengths[None, :])
