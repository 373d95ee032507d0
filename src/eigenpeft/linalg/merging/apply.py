"""Updates of one weight, as factors or on common axes, merged to the factors of one LoRA."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.cores.core_space import EXACT, CoreSpace, core_factors, core_space, with_model_inputs
from eigenpeft.linalg.cores.spectral import triplets, weighted
from eigenpeft.linalg.merging.measures import MergeMeasures, measure_merge
from eigenpeft.linalg.merging.registry import find_rule, merge_cores
from eigenpeft.linalg.rules.pico import norm_scale


@dataclass(frozen=True, kw_only=True)
class MergedUpdate:
    """One weight's merged update.

    Attributes:
        lora_B: Left factor; the scaling is 1.
        lora_A: Right factor, of equal norm.
        scale: λ that was applied.
        rank: Numerical rank before the cut.
        measures: What the merge did.
    """

    lora_B: Float[Tensor, "m r"]
    lora_A: Float[Tensor, "r n"]
    scale: float
    rank: int
    measures: MergeMeasures


def merge_updates(
    updates: Sequence[Factors] | CoreSpace,
    *,
    rule: str = "task_arithmetic",
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    calibrate: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> MergedUpdate:
    """Merge updates of one weight into one LoRA: core space, rule, λ, optimal truncation.

    Args:
        updates: `(lora_B (m, r_t), lora_A (r_t, n))` of each, scaling folded in; or a `CoreSpace` that has them.
        rule: Name in `RULES`.
        weights: One number per update, which scales it; None for 1.
        scale: λ, the final multiplier; "auto" makes the merged norm the mean of the updates' norms, weights included; None
            takes the rule's own.
        rank: Rank of the factors, filled up with zeros where there is less; None loses nothing.
        calibrate: As for `merge_cores`.
        dtype: Dtype of the factors; everything before the last product is float64.
        **options: As for `merge_cores`.

    Returns:
        `MergedUpdate`.

    Raises:
        ValueError: If an argument is unknown or out of range, `scale` is no finite number, a pair is no `(m, r_t)` and `(r_t, n)`
            of finite numbers, or the updates do not fit together.

    Example:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> merged = merge_updates([(B, A), (2 * B, A)], weights=[1.0, -0.25])
        >>> torch.allclose(merged.lora_B @ merged.lora_A, 0.5 * (B @ A).double(), atol=1e-5)
        True
    """
    row = find_rule(rule)
    multiplier = _multiplier(row.scale if scale is None else scale)
    space = updates if isinstance(updates, CoreSpace) else core_space(updates)
    if row.model_inputs:
        space = with_model_inputs(space)
    merged = merge_cores(space.cores, rule=rule, weights=weights, calibrate=calibrate, **options)
    if multiplier is None:
        multiplier = float(norm_scale(merged, cores=weighted(space.cores, weights)))
    parts = triplets(multiplier * merged, noise=EXACT)
    lora_B, lora_A = core_factors(parts, space=space, rank=rank, dtype=dtype)
    measures = measure_merge(parts, cores=space.cores, rank=rank)
    return MergedUpdate(lora_B=lora_B, lora_A=lora_A, scale=multiplier, rank=len(parts.S), measures=measures)


def _multiplier(scale: float | str) -> float | None:
    """λ as a number; None where it is "auto"."""
    if isinstance(scale, str) and scale == "auto":
        return None
    try:
        number = math.nan if isinstance(scale, str) else float(scale)
    except (TypeError, ValueError, RuntimeError):  # lists, and tensors of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"scale={scale!r} must be a finite number, 'auto', or None for the rule's own.")
    return number
