"""Bases of adapters that do not fit into memory together: one pass over chunks of them, with a bound on what is missed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.fitting import METHODS, FittedBases
from eigenpeft.linalg.bases.incremental import Sketch, empty_sketch, extend_sketch
from eigenpeft.linalg.bases.stacking import Factors, Weighting, share_curve, stack_factors
from eigenpeft.linalg.shares import added_shares

# Components a sketch carries for each that is wanted: 2 miss about 1e-4 of a decaying stack's squared norm, 1 far more.
SKETCH_FACTOR = 2


@dataclass(frozen=True)
class ChunkedFit:
    """Bases fitted in one pass over chunks of adapters.

    Attributes:
        bases: As `fit_bases` gives them; the explained shares are exact, measured in a second pass.
        missed_bound_in: Share of the input stack's squared norm that its components miss, against the best ones, at most.
        missed_bound_out: The same for the output side.
    """

    bases: FittedBases
    missed_bound_in: float
    missed_bound_out: float


def fit_chunks(
    chunks: Callable[[], Iterable[Sequence[Factors]]],
    *,
    n_components: int,
    method: Literal["balanced", "hosvd"] = "balanced",
    weighting: Weighting = "equal",
) -> ChunkedFit:
    """`fit_bases` without ever holding the factors of more than one chunk of adapters.

    The stack of each chunk is merged into a sketch of 2 K directions per side (merge-and-truncate; `extend_sketch`).
    Exact where all adapters together span no more than 2 K directions.

    Args:
        chunks: Gives the chunks, the same ones each time; called twice.
        n_components: K, a number.
        method: One of `MERGEABLE`, whose bases come from one growing stack of rows.
        weighting: As for `fit_bases`.

    Returns:
        `ChunkedFit`.

    Raises:
        ValueError: If all updates are zero, or K exceeds the rank of what was kept of a side.
    """
    rows = METHODS[method].rows
    sketches: tuple[Sketch, Sketch] | None = None
    norms: list[float] = []
    squared_norm, n_rows = 0.0, 0
    for factors in chunks():
        stacks = stack_factors(factors, rows=rows, weighting=weighting)
        if sketches is None:
            kind = {"dtype": stacks.rows_in.dtype, "device": stacks.rows_in.device}
            sketches = empty_sketch(stacks.rows_in.shape[1], **kind), empty_sketch(stacks.rows_out.shape[1], **kind)
        sketches = (
            extend_sketch(sketches[0], stacks.rows_in, size=SKETCH_FACTOR * n_components),
            extend_sketch(sketches[1], stacks.rows_out, size=SKETCH_FACTOR * n_components),
        )
        norms += stacks.norms
        squared_norm += stacks.squared_norm
        n_rows += len(stacks.rows_in)
    if sketches is None or squared_norm == 0.0:
        raise ValueError("every adapter's update is zero, so there is nothing to fit; pass trained adapters.")
    _check_rank(sketches, n_components, n_rows=n_rows)
    components_in, components_out = (sketch.components[:n_components].contiguous() for sketch in sketches)
    curve = _explained(chunks, components_in, components_out, weighting=weighting)
    bounds = [sketch.missed_squared_norm_bound(n_components) / sketch.total_squared_norm for sketch in sketches]
    bases = FittedBases(
        components_in=components_in,
        components_out=components_out,
        singular_values_in=sketches[0].singular_values[:n_components],
        singular_values_out=sketches[1].singular_values[:n_components],
        explained_variance_ratio=added_shares(curve).to(components_in.dtype),
        norms=tuple(norms),
    )
    return ChunkedFit(bases, missed_bound_in=bounds[0], missed_bound_out=bounds[1])


def _check_rank(sketches: tuple[Sketch, Sketch], n_components: int, *, n_rows: int) -> None:
    for side, sketch in zip(("in", "out"), sketches, strict=True):
        rank, width = sketch.components.shape
        if rank < n_components:
            raise ValueError(
                f"n_components={n_components} exceeds the numerical rank {rank} of the {side!r} side ({n_rows} rows of "
                f"length {width}); pass at most {rank}, or add adapters."
            )


def _explained(
    chunks: Callable[[], Iterable[Sequence[Factors]]],
    components_in: Float[Tensor, "k n"],
    components_out: Float[Tensor, "k m"],
    *,
    weighting: Weighting,
) -> Float[Tensor, " k"]:
    """`explained_share_curve` over chunks: the mean of theirs, weighted by their squared norms."""
    total, squared_norm = torch.zeros(len(components_in), dtype=torch.float64, device=components_in.device), 0.0
    for factors in chunks():
        stacks = stack_factors(factors, rows="raw", weighting=weighting)
        if stacks.sizes:
            total += stacks.squared_norm * share_curve(stacks, components_in, components_out)
            squared_norm += stacks.squared_norm
    return total / squared_norm
