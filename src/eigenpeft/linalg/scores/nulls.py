"""Matched nulls: updates as large and as long as the real ones, in directions that nobody learnt."""

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.factored import balancing
from eigenpeft.linalg.orthogonal import orthonormal_rows


def matched_null(
    factors: Sequence[Factors], *, generator: Generator, common_start: Sequence[Hashable] | None = None
) -> list[Factors]:
    """For each `ΔW = U S Vᵀ` a random `Û S V̂ᵀ`: the same shape and singular values, uniformly random directions.

    What a collection of such updates "shares" is what any collection shares by its sizes alone.

    Args:
        factors: `(lora_B, lora_A)` of each adapter, the scaling folded into lora_B.
        generator: Source of the directions.
        common_start: A label for each adapter; adapters of one label get the same V̂ (its leading directions, where ranks
            differ), as adapters keep that were trained from one random lora_A. None: every V̂ is its own.

    Returns:
        Balanced factors `(Û S^{1/2}, S^{1/2} V̂ᵀ)`, float32; of rank 0 where the update is zero.

    Raises:
        ValueError: If `common_start` has another length than `factors`.

    Example:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> [(null_B, null_A)] = matched_null([(B, A)], generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(torch.linalg.svdvals(null_B @ null_A)[:2], torch.linalg.svdvals(B @ A)[:2], atol=1e-5)
        True
    """
    labels = list(common_start) if common_start is not None else list(range(len(factors)))
    if len(labels) != len(factors):
        raise ValueError(f"common_start has {len(labels)} labels for {len(factors)} adapters; pass one each.")
    spectra = [balancing(lora_B, lora_A).singular_values for lora_B, lora_A in factors]
    ranks = [len(values) for values in spectra]
    starts = {}
    for label, (_, lora_A) in zip(labels, factors, strict=True):
        most = max(rank for rank, other in zip(ranks, labels, strict=True) if other == label)
        if label not in starts:
            starts[label] = _directions(most, lora_A.shape[1], generator)
    result = []
    for values, label, (lora_B, _) in zip(spectra, labels, factors, strict=True):
        roots, out_side = values.sqrt(), _directions(len(values), len(lora_B), generator)
        lora_B_null = (out_side.mT * roots).float()
        result.append((lora_B_null, (roots[:, None] * starts[label][: len(values)]).float()))
    return result


def chance_curve(n_components: int, *widths: int) -> Float[Tensor, " k"]:
    """Expected share of a matrix with uniformly random singular vectors that 1, 2, ..., K fixed directions explain.

    `E ‖V_out ΔW V_inᵀ‖² / ‖ΔW‖² = (K / m)(K / n)` whatever the singular values, and `K / n` for one side alone: exact
    for components that have not seen ΔW, as held-out ones.

    Args:
        n_components: Largest K.
        *widths: m and n for both sides, one of them for one side.

    Returns:
        Float64; 1 from the K on that spans a side.

    Example:
        >>> chance_curve(2, 10, 4)
        tensor([0.0250, 0.1000], dtype=torch.float64)
    """
    steps = torch.arange(1, n_components + 1, dtype=torch.float64)
    curve = torch.ones_like(steps)
    for width in widths:
        curve = curve * (steps / width).clamp(max=1.0)
    return curve


def chance_cosine(gradient_squares: Sequence[float], update_squares: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard deviation of `⟨G, ΔW⟩ / (‖G‖ ‖ΔW‖)` over updates as `matched_null` draws them, all weights together.

    With uniformly random singular vectors `E ⟨G_l, ΔW_l⟩² = ‖G_l‖² ‖ΔW_l‖² / (m_l n_l)` in weight l whatever the singular values,
    the mean is 0, and weights are independent of each other.

    Args:
        gradient_squares: ‖G_l‖² of each weight.
        update_squares: ‖ΔW_l‖² of each weight.
        sizes: m_l n_l of each weight.

    Returns:
        0 where either is zero in all weights.

    Raises:
        ValueError: If the arguments differ in length.

    Example:
        >>> chance_cosine([1.0, 1.0], [2.0, 2.0], [50, 50])
        0.1
    """
    total = sum(gradient_squares) * sum(update_squares)
    if not total > 0:
        return 0.0
    each = zip(gradient_squares, update_squares, sizes, strict=True)
    return math.sqrt(sum(gradient * update / size for gradient, update, size in each) / total)


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """`exp(-Σ p log p)` of the squared norms `p = σ² / Σσ²`: how many directions of equal weight would be as spread.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, with squared norms in the place of singular values.

    Args:
        singular_values: Not all zero.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    squared_norms = singular_values.to(torch.float64).square()
    shares = squared_norms[squared_norms > 0] / squared_norms.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _directions(n_rows: int, width: int, generator: Generator) -> Float[Tensor, "r n"]:
    """Uniformly random orthonormal rows, float64."""
    noise = torch.randn(n_rows, width, generator=generator, device=generator.device, dtype=torch.float64)
    return orthonormal_rows(noise)
