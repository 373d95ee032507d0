"""Bases that grow by the directions that new adapters need and the bases lack; the old components stay as they are."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.bases.stacking import ManyFactors, Stacks, Weighting, cores, stack_factors
from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.orthogonal import orthonormal_rows

# What is left of a stack that lies in float32 bases is rounding of this size, relative to the stack.
_ROUNDING = 1e-6
# A share is reached when it is missed by no more than the rounding of float32 data.
_SHARE_SLACK = 1e-6


@dataclass(frozen=True)
class Growth:
    """Components to put behind those of a pair of bases, and what they are good for.

    Attributes:
        components_in: Orthonormal rows, orthogonal to the old ones; perhaps none.
        components_out: The same for the output side.
        singular_values_in: Singular values of what the old bases lack of the new adapters' stacked rows, descending, one per
            component.
        singular_values_out: The same for the output side.
        share_before: Share of `Σ ω²‖ΔW‖²` of the new adapters that the old bases hold.
        share_after: Share that the grown bases hold.
    """

    components_in: Float[Tensor, "d_in n"]
    components_out: Float[Tensor, "d_out m"]
    singular_values_in: Float[Tensor, " d_in"]
    singular_values_out: Float[Tensor, " d_out"]
    share_before: float
    share_after: float


def lacking_directions(
    factors: ManyFactors,
    *,
    components_in: Float[Tensor, "k_in n"],
    components_out: Float[Tensor, "k_out m"],
    held_share: float = 1.0,
    weighting: Weighting = "equal",
    tol: float = 1e-4,
    generator: Generator | None = None,
) -> Growth:
    """The fewest directions with which a pair of bases holds a share of new adapters.

    With the rows `A'` of all balanced factors and the old components V, the new ones are the leading right singular vectors
    of `A' (I - VᵀV)`, and those of `B'ᵀ (I - VᵀV)` on the other side: one step of the sequential Karhunen-Loève transform
    (Levy and Lindenbaum, IEEE Trans. Image Processing 9, 2000) that adds and never turns what is there, so that every core in
    the old bases is a core in the new ones. "Shared LoRA Subspaces" (arXiv 2602.06043), in its merge phase, decomposes old and new
    together and turns them.

    Args:
        factors: `(lora_B (m, r_i), lora_A (r_i, n))` of each new adapter, the scaling folded into lora_B; ranks may differ.
        components_in: Orthonormal rows of the input space; (0, n) for none.
        components_out: Orthonormal rows of the output space; (0, m) for none.
        held_share: Share of `Σ ω²‖ΔW‖²` to reach, in (0, 1]; 1 takes all directions but rounding.
        weighting: "equal" (default) weighs every adapter by `ω = 1 / ‖ΔW‖`, "none" by 1.
        tol: Tolerance of the iterative solver.
        generator: Source of the iterative solver's start; None always takes the same.

    Returns:
        `Growth` in the components' dtype; as many directions on both sides, unless one side runs out of them.

    Raises:
        ValueError: If `held_share` is out of range, the weighting is unknown, or shapes differ.

    Example:
        >>> import torch
        >>> old = torch.eye(3)[:1]
        >>> grown = lacking_directions([(torch.ones(3, 1), torch.ones(1, 3))], components_in=old, components_out=old)
        >>> grown.components_in, round(grown.share_before, 4), round(grown.share_after, 4)
        (tensor([[0.0000, 0.7071, 0.7071]]), 0.1111, 1.0)
    """
    if not 0.0 < held_share <= 1.0:
        raise ValueError(
            f"held_share={held_share} must be in (0, 1]: the share of the new adapters that the bases are to hold."
        )
    stacks = stack_factors(factors, rows="balanced", weighting=weighting)
    none = components_in.new_zeros(0)
    if not stacks.sizes:
        return Growth(components_in[:0], components_out[:0], none, none, share_before=1.0, share_after=1.0)
    new_in, values_in = directions_outside(stacks.rows_in, components_in, tol=tol, generator=generator)
    new_out, values_out = directions_outside(stacks.rows_out, components_out, tol=tol, generator=generator)
    curve = _curve(stacks, (components_in, new_in), (components_out, new_out))
    wanted = len(curve) - 1
    if held_share < 1.0:
        reached = (curve >= held_share - _SHARE_SLACK).nonzero()
        wanted = int(reached[0]) if len(reached) else wanted
    return Growth(
        components_in=new_in[:wanted].to(components_in.dtype),
        components_out=new_out[:wanted].to(components_out.dtype),
        singular_values_in=values_in[:wanted].to(components_in.dtype),
        singular_values_out=values_out[:wanted].to(components_out.dtype),
        share_before=float(curve[0]),
        share_after=float(curve[wanted]),
    )


def directions_outside(
    rows: Float[Tensor, "p n"],
    components: Float[Tensor, "k n"],
    *,
    tol: float = 1e-4,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "d n"], Float[Tensor, " d"]]:
    """What rows X have outside the span of components V: leading right singular vectors of `X (I - VᵀV)`, and their values.

    Args:
        rows: X.
        components: V, orthonormal rows.
        tol: Tolerance of the iterative solver.
        generator: Source of its start; None always takes the same.

    Returns:
        Orthonormal rows, leading first, and singular values, float64; those that are rounding of X are left out.

    Raises:
        ValueError: If there are more components than features.

    Example:
        >>> import torch
        >>> rows, values = directions_outside(torch.tensor([[3.0, 4.0]]), torch.eye(2)[:1])
        >>> rows.abs(), values
        (tensor([[0., 1.]], dtype=torch.float64), tensor([4.], dtype=torch.float64))
    """
    components = orthonormal_rows(components.to(torch.float64)) if len(components) else components.to(torch.float64)
    exact = rows.to(torch.float64)
    rest = exact - (exact @ components.mT) @ components
    most = min(len(rows), rows.shape[1] - len(components))
    if most < 1 or float(rest.norm()) <= _ROUNDING * float(exact.norm()):
        return components[:0], components.new_zeros(0)
    found = leading_components(rest, n_components=most, tol=tol, generator=generator)
    kept = int((found.singular_values > _ROUNDING * exact.norm()).sum())
    directions = found.components[:kept].to(torch.float64)
    directions = orthonormal_rows(directions - (directions @ components.mT) @ components)
    return directions + 0.0, found.singular_values[:kept]  # no negative zeros


def _curve(stacks: Stacks, pair_in: tuple[Tensor, Tensor], pair_out: tuple[Tensor, Tensor]) -> Float[Tensor, " steps"]:
    """Share of the stacks' squared norm that the old components hold with the first 0, 1, ... new ones of both sides."""
    all_in, all_out = (torch.cat([old.to(torch.float64), new]) for old, new in (pair_in, pair_out))
    coefficients_in = stacks.rows_in.to(torch.float64) @ all_in.mT
    coefficients_out = stacks.middle[:, None] * (stacks.rows_out.to(torch.float64) @ all_out.mT)
    squared_norm = torch.zeros(len(all_out), len(all_in), dtype=torch.float64, device=all_in.device)
    for core in cores(stacks, coefficients_in, coefficients_out):
        squared_norm += core.square()
    sums = torch.nn.functional.pad(squared_norm.cumsum(0).cumsum(1), (1, 0, 1, 0))
    steps = torch.arange(1 + max(len(pair_in[1]), len(pair_out[1])), device=all_in.device)
    rows, columns = (len(old) + steps.clamp(max=len(new)) for old, new in (pair_out, pair_in))
    return sums[rows, columns] / stacks.squared_norm
