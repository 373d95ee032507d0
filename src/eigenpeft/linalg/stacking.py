"""The rows that each method decomposes, stacked from the factors of many adapters of one weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.factored import balance, frobenius_norm

Factors = tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]
"""`(lora_B, lora_A)` of one adapter, the scaling folded into lora_B."""

Rows = Literal["balanced", "moments", "raw"]
Weighting = Literal["equal", "energy"]
WEIGHTINGS = ("equal", "energy")


@dataclass(frozen=True)
class Stacks:
    """Rows of all adapters: `ω_i ΔW_i = rows_outᵀ diag(middle) rows_in` over the rows of adapter i.

    Attributes:
        rows_in: Rows of all adapters in the input space.
        rows_out: Rows of all adapters in the output space.
        middle: What stands between a row of each side.
        sizes: Number of rows of each adapter.
        energy: `Σ ω_i² ‖ΔW_i‖²`.
    """

    rows_in: Float[Tensor, "p n"]
    rows_out: Float[Tensor, "p m"]
    middle: Float[Tensor, "p"]
    sizes: tuple[int, ...]
    energy: float


def stack_factors(factors: Sequence[Factors], *, rows: Rows, weighting: Weighting) -> Stacks:
    """Stack the rows of all adapters whose update is not zero.

    Args:
        factors: `(lora_B, lora_A)` of each adapter; ranks may differ.
        rows: "balanced": rows of `S^{1/2} Vᵀ` and `S^{1/2} Uᵀ` of each weighted `ΔW = U S Vᵀ`. "moments": of `S Vᵀ` and
            `S Uᵀ`, whose Gram matrices are `ΔWᵀΔW` and `ΔWΔWᵀ`. "raw": of lora_A and lora_Bᵀ as they are, the weight in
            `middle`.
        weighting: "equal" gives each ΔW unit Frobenius norm, "energy" leaves it.

    Returns:
        `Stacks`, without rows if every update is zero; float64 if a factor is, else float32.

    Raises:
        ValueError: If the weighting is unknown, there are no factors, or their outer sizes differ.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} is unknown; pass 'equal' or 'energy'.")
    shapes = sorted({(lora_B.shape[0], lora_A.shape[1]) for lora_B, lora_A in factors})
    if len(shapes) != 1:
        raise ValueError(
            f"factors of {len(factors)} adapters of shapes (out, in) {shapes} cannot be stacked; "
            "pass at least one adapter, all of one shape."
        )
    rows_in, rows_out, middle, energy = [], [], [], 0.0
    for lora_B, lora_A in factors:
        stack_one = _raw_rows if rows == "raw" else _balanced_rows
        stacked = stack_one(lora_B, lora_A, rows, weighting)
        if stacked is not None:
            rows_in.append(stacked.rows_in)
            rows_out.append(stacked.rows_out)
            middle.append(stacked.middle)
            energy += stacked.energy
    dtype = torch.float64 if any(t.dtype == torch.float64 for pair in factors for t in pair) else torch.float32
    (m, n), device = shapes[0], factors[0][1].device
    return Stacks(
        rows_in=torch.cat([torch.empty(0, n, dtype=dtype, device=device), *rows_in]),
        rows_out=torch.cat([torch.empty(0, m, dtype=dtype, device=device), *rows_out]),
        middle=torch.cat([torch.empty(0, dtype=dtype, device=device), *middle]),
        sizes=tuple(len(part) for part in middle),
        energy=energy,
    )


def _balanced_rows(
    lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"], rows: Rows, weighting: Weighting
) -> Stacks | None:
    balanced_B, balanced_A = balance(lora_B, lora_A)
    if len(balanced_A) == 0:
        return None
    values = torch.linalg.vector_norm(balanced_A, dim=1).square()  # rows of S^{1/2} Vᵀ have norms S^{1/2}
    norm = torch.linalg.vector_norm(values)
    weight = 1.0 / norm if weighting == "equal" else torch.ones_like(norm)
    scale = (weight * torch.ones_like(values)).sqrt() if rows == "balanced" else weight * values.sqrt()
    return Stacks(
        rows_in=scale[:, None] * balanced_A,
        rows_out=scale[:, None] * balanced_B.mT,
        middle=weight / scale.square(),
        sizes=(len(values),),
        energy=float((weight * norm).to(torch.float64).square()),
    )


def _raw_rows(
    lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"], rows: Rows, weighting: Weighting
) -> Stacks | None:
    norm = frobenius_norm(lora_B, lora_A)
    if norm == 0.0:
        return None
    weight = 1.0 / norm if weighting == "equal" else torch.ones_like(norm)
    dtype = torch.promote_types(torch.promote_types(lora_B.dtype, lora_A.dtype), torch.float32)
    return Stacks(
        rows_in=lora_A.to(dtype),
        rows_out=lora_B.to(dtype).mT,
        middle=weight.to(dtype).expand(len(lora_A)),
        sizes=(len(lora_A),),
        energy=float((weight * norm).square()),
    )
