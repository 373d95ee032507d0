"""Alternating refinement of a pair of bases towards the least error of the projected updates."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Stacks, cores
from eigenpeft.linalg.decompose import Decomposition
from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows

_MAX_SWEEPS = 100


def refine(
    stacks: Stacks, components_in: Float[Tensor, "k n"], components_out: Float[Tensor, "k m"], *, tol: float
) -> tuple[Decomposition, Decomposition]:
    """Raise `Σ ω²‖V_out ΔW V_inᵀ‖²` by alternating power steps on both sides.

    With one side fixed the objective is `tr(V M Vᵀ)`, convex in V, so the step `V <- orthonormal rows of V M` never
    lowers it; M is applied through the stacks. Each sweep costs four products of a stack with a basis.

    Args:
        stacks: Rows of the adapters.
        components_in: Orthonormal rows to start from, input side.
        components_out: Orthonormal rows to start from, output side.
        tol: Stop when a sweep gains less than this, relative to the objective; after 100 sweeps in any case.

    Returns:
        The input and the output side, each turned within its span so that its leading components explain most.

    Raises:
        ValueError: If there are more components than features.
    """
    coefficients_in = stacks.rows_in @ components_in.mT
    coefficients_out = stacks.middle[:, None] * (stacks.rows_out @ components_out.mT)
    blocks = cores(stacks, coefficients_in, coefficients_out)
    explained = _squared_norm(blocks)
    for _ in range(_MAX_SWEEPS):
        parts = zip(coefficients_in.split(stacks.sizes), blocks, strict=True)
        weights = stacks.middle[:, None] * torch.cat([part @ block.mT for part, block in parts])
        components_out = orthonormal_rows(weights.mT @ stacks.rows_out)
        coefficients_out = stacks.middle[:, None] * (stacks.rows_out @ components_out.mT)
        blocks = cores(stacks, coefficients_in, coefficients_out)

        parts = zip(coefficients_out.split(stacks.sizes), blocks, strict=True)
        weights = torch.cat([part @ block for part, block in parts])
        components_in = orthonormal_rows(weights.mT @ stacks.rows_in)
        coefficients_in = stacks.rows_in @ components_in.mT
        blocks = cores(stacks, coefficients_in, coefficients_out)

        previous, explained = explained, _squared_norm(blocks)
        if explained - previous <= tol * explained:
            break
    moment_in = torch.stack([block.mT @ block for block in blocks]).sum(dim=0)
    moment_out = torch.stack([block @ block.mT for block in blocks]).sum(dim=0)
    return _turned(components_in, moment_in), _turned(components_out, moment_out)


def _squared_norm(blocks: list[Float[Tensor, "k k"]]) -> float:
    return sum(float(block.square().sum()) for block in blocks)


def _turned(components: Float[Tensor, "k n"], moment: Float[Tensor, "k k"]) -> Decomposition:
    """The same span, turned to the eigenvectors of the second moment within it."""
    values, rotation = torch.linalg.eigh(moment.to(torch.float64))
    turned = orthonormal_rows(rotation.flip(1).mT @ components.to(torch.float64))
    return Decomposition(
        components=fix_signs(turned.to(components.dtype)),
        singular_values=values.flip(0).clamp(min=0.0).sqrt().to(components.dtype),
        total_squared_norm=float(moment.diagonal().sum()),
        n_iterations=0,
        relative_residual=0.0,
    )
