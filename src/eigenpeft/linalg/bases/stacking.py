"""The rows that each method decomposes, stacked from the factors of many adapters of one weight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.factored import balancing, frobenius_norm
from eigenpeft.linalg.shares import leading_squared_norms

Factors = tuple[Float[Tensor, "_m _r"], Float[Tensor, "_r _n"]]
"""`(lora_B, lora_A)` of one adapter, the scaling folded into lora_B. Ranks differ, so the axes are not compared."""


@dataclass(frozen=True)
class FactorStream:
    """Factors of many adapters of one weight that are read one after another and not kept.

    Attributes:
        n_rows: Σ r over the adapters.
        read: Starts reading from the first adapter; may be called again.

    Examples:
        >>> import torch
        >>> stream = FactorStream(n_rows=4, read=lambda: iter([(torch.ones(3, 2), torch.ones(2, 5))] * 2))
        >>> [lora_A.shape for _, lora_A in stream]
        [torch.Size([2, 5]), torch.Size([2, 5])]
    """

    n_rows: int
    read: Callable[[], Iterator[Factors]]

    def __iter__(self) -> Iterator[Factors]:
        """The adapters' factors, in order."""
        return self.read()


ManyFactors = Sequence[Factors] | FactorStream
"""The factors of all adapters of one weight, in memory or read as they are needed."""

Rows = Literal["balanced", "moments", "raw"]
Weighting = Literal["equal", "none"]
WEIGHTINGS = ("equal", "none")


@dataclass(frozen=True)
class Stacks:
    """Rows of all adapters: `ω_i ΔW_i = rows_outᵀ diag(middle) rows_in` over the rows of adapter i.

    Attributes:
        rows_in: Rows of all adapters in the input space.
        rows_out: Rows of all adapters in the output space.
        middle: What stands between a row of each side.
        sizes: Number of rows of each adapter.
        squared_norm: `Σ ω_i² ‖ΔW_i‖²`.
        norms: ‖ΔW_i‖ of every adapter given, those whose update is zero included.
    """

    rows_in: Float[Tensor, "p n"]
    rows_out: Float[Tensor, "p m"]
    middle: Float[Tensor, " p"]
    sizes: tuple[int, ...]
    squared_norm: float
    norms: tuple[float, ...]


def stack_factors(factors: ManyFactors, *, rows: Rows, weighting: Weighting) -> Stacks:
    """Stack the rows of all adapters whose update is not zero.

    Args:
        factors: `(lora_B, lora_A)` of each adapter; ranks may differ. Looked at once, one after another.
        rows: "balanced": rows of `S^{1/2} Vᵀ` and `S^{1/2} Uᵀ` of each weighted `ΔW = U S Vᵀ`. "moments": of `S Vᵀ` and
            `S Uᵀ`, whose Gram matrices are `ΔWᵀΔW` and `ΔWΔWᵀ`. "raw": of lora_A and lora_Bᵀ as they are, the weight in
            `middle`.
        weighting: "equal" gives each ΔW unit Frobenius norm, "none" leaves it.

    Returns:
        `Stacks`, without rows if every update is zero; float64 if a factor is, or if an update is so large or small that
        rows or weights of it would leave float32's range; else float32.

    Raises:
        ValueError: If the weighting is unknown, there are no factors, or their outer sizes differ.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} is unknown; pass 'equal' or 'none'.")
    most = factors.n_rows if isinstance(factors, FactorStream) else sum(len(lora_A) for _, lora_A in factors)
    # Written in place: these are the largest tensors there are, and parts to be joined would double the peak.
    rows_in, rows_out, middle = torch.empty(0), torch.empty(0), torch.empty(0)
    sizes, norms, shapes, squared_norm, start = [], [], [], 0.0, 0
    write = _write_raw if rows == "raw" else _write_balanced
    for lora_B, lora_A in factors:
        m, n = len(lora_B), lora_A.shape[1]
        dtype = torch.float32 if _fits_float32(lora_B, lora_A) else torch.float64
        shapes.append((m, n))
        if shapes[-1] != shapes[0]:
            continue  # only to name all shapes
        if not norms:
            rows_in, rows_out, middle = (
                torch.empty(shape, dtype=dtype, device=lora_A.device) for shape in ((most, n), (most, m), (most,))
            )
        elif dtype == torch.float64 and rows_in.dtype != dtype:
            rows_in, rows_out, middle = (tensor.to(dtype) for tensor in (rows_in, rows_out, middle))
        part = slice(start, start + len(lora_A))
        unit_norm, moments = weighting == "equal", rows == "moments"
        size, norm = write(
            lora_B, lora_A, rows_in[part], rows_out[part], middle[part], unit_norm=unit_norm, moments=moments
        )
        norms.append(norm)
        if size:
            sizes.append(size)
            squared_norm += 1.0 if unit_norm else norm**2
            start += size
    if len(set(shapes)) != 1:
        raise ValueError(
            f"factors of {len(shapes)} adapters of shapes (out, in) {sorted(set(shapes))} cannot be stacked; "
            "pass at least one adapter, all of one shape."
        )
    return Stacks(
        rows_in=rows_in[:start],
        rows_out=rows_out[:start],
        middle=middle[:start],
        sizes=tuple(sizes),
        squared_norm=squared_norm,
        norms=tuple(norms),
    )


def cores(
    stacks: Stacks, coefficients_in: Float[Tensor, "p k_in"], coefficients_out: Float[Tensor, "p k_out"]
) -> list[Float[Tensor, "k_out k_in"]]:
    """`V_out (ω ΔW_i) V_inᵀ` of every adapter.

    Args:
        stacks: Rows of the adapters.
        coefficients_in: `rows_in V_inᵀ`.
        coefficients_out: `diag(middle) rows_out V_outᵀ`.

    Returns:
        One matrix per adapter.
    """
    pairs = zip(coefficients_out.split(stacks.sizes), coefficients_in.split(stacks.sizes), strict=True)
    return [part_out.mT @ part_in for part_out, part_in in pairs]


def share_curve(
    stacks: Stacks, components_in: Float[Tensor, "k_in n"], components_out: Float[Tensor, "k_out m"]
) -> Float[Tensor, " k"]:
    """Share of the stacks' squared norm that the first 1, 2, ..., max(K_in, K_out) components of both sides explain.

    Args:
        stacks: Rows of the adapters.
        components_in: Orthonormal rows in the input space.
        components_out: Orthonormal rows in the output space.

    Returns:
        The cumulative share, float64.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> stacks = stack_factors([(torch.diag(torch.tensor([2.0, 1.0])), eye)], rows="balanced", weighting="none")
        >>> share_curve(stacks, eye, eye).round(decimals=4).tolist()
        [0.8, 1.0]
    """
    dtype = stacks.rows_in.dtype
    coefficients_in = stacks.rows_in @ components_in.to(dtype).mT
    coefficients_out = stacks.middle[:, None] * (stacks.rows_out @ components_out.to(dtype).mT)
    squared_norm = torch.zeros(
        len(components_out), len(components_in), dtype=torch.float64, device=stacks.rows_in.device
    )
    for core in cores(stacks, coefficients_in, coefficients_out):
        squared_norm += core.square()
    return leading_squared_norms(squared_norm) / stacks.squared_norm


def _fits_float32(lora_B: Tensor, lora_A: Tensor) -> bool:
    """Whether all of an adapter's rows and weights fit: they go from 1 / ‖ΔW‖ to ‖ΔW‖, and ‖ΔW‖ is at most ‖B‖ ‖A‖."""
    if torch.float64 in (lora_A.dtype, lora_B.dtype):
        return False
    bound = float(torch.linalg.vector_norm(lora_B, dtype=torch.float64)) * float(
        torch.linalg.vector_norm(lora_A, dtype=torch.float64)
    )
    return bound == 0.0 or 1e-18 < bound < 1e18


def _write_balanced(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    rows_in: Float[Tensor, "r n"],
    rows_out: Float[Tensor, "r m"],
    middle: Float[Tensor, " r"],
    *,
    unit_norm: bool,
    moments: bool,
) -> tuple[int, float]:
    """Fill the heads of one adapter's parts of the stacks; returns the number of rows and ‖ΔW‖."""
    turn = balancing(lora_B, lora_A)
    values, size = turn.singular_values, len(turn.singular_values)
    norm = torch.linalg.vector_norm(values)
    weight = 1.0 / norm if unit_norm else torch.ones_like(norm)
    # Balanced rows carry S^{1/2} already; second moments need S on both sides, and its inverse between them.
    scale = weight * values.sqrt() if moments else weight.sqrt().expand(size)
    rows_in[:size] = (scale[:, None] * turn.in_side) @ lora_A.to(torch.float64)
    rows_out[:size] = (scale[:, None] * turn.out_side.mT) @ lora_B.to(torch.float64).mT
    middle[:size] = weight / scale.square()
    return size, float(norm)


def _write_raw(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    rows_in: Float[Tensor, "r n"],
    rows_out: Float[Tensor, "r m"],
    middle: Float[Tensor, " r"],
    *,
    unit_norm: bool,
    moments: bool,
) -> tuple[int, float]:
    """`_write_balanced` for the factors as they are; `moments` has no meaning here."""
    norm = float(frobenius_norm(lora_B, lora_A))
    if norm == 0.0:
        return 0, 0.0
    rows_in.copy_(lora_A)
    rows_out.copy_(lora_B.mT)
    middle.fill_(1.0 / norm if unit_norm else 1.0)
    return len(lora_A), norm
