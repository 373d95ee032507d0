"""Comparisons made ready for the joint fit: differences, scaled, on their leading directions, with reference margins."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.preference.joint import fit_joint
from eigenpeft.linalg.preference.objective import JointPrior, column_scales
from eigenpeft.reward.artifact.pairs import Features, difference_chunks

# Rows that the leading directions are taken from; more change them little and cost much.
SAMPLE_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class Preparation:
    """How differences became coordinates, and how heads go back.

    Attributes:
        scales: (n_features,) what each feature is divided by.
        components: (n_components, n_features) orthonormal rows of scaled features; None for all of them.
        reference: (n_features,) reference head in the scale fitted to the data.
        total_variance: Mean squared length of a difference in the coordinates.
    """

    scales: Tensor
    components: Tensor | None
    reference: Tensor
    total_variance: float

    def restore(self, deviations: Tensor) -> Tensor:
        """Heads on the original features.

        Args:
            deviations: (n_basis, n_coordinates), what is added to the reference.

        Returns:
            (n_basis, n_features).
        """
        scaled = deviations if self.components is None else deviations @ self.components
        return self.reference + scaled / self.scales


@dataclass(frozen=True, eq=False)
class PreparedPairs:
    """Comparisons in the coordinates of the fit.

    Attributes:
        differences: (n, n_coordinates).
        offsets: (n,) margins under the reference.
        preparation: How they were made.
    """

    differences: Tensor
    offsets: Tensor
    preparation: Preparation

    def select(self, mask: Tensor) -> "PreparedPairs":
        """Some of the comparisons.

        Args:
            mask: (n,) bool.
        """
        return PreparedPairs(self.differences[mask], self.offsets[mask], self.preparation)


def prepare(
    chosen: Features,
    rejected: Features,
    *,
    reference_head: Tensor | None,
    n_components: int | None,
    standardize: bool,
    seed: int,
) -> PreparedPairs:
    """Read all comparisons twice, in parts: once for scales and directions, once for their coordinates.

    Args:
        chosen: (n, n_features).
        rejected: (n, n_features).
        reference_head: (n_features,), or None.
        n_components: Leading directions to keep; None keeps the features as they are.
        standardize: Divide each feature by its root mean square; else all by one number.
        seed: Start of the iteration that finds the directions.

    Raises:
        RewardModelError: If shapes do not fit, values are not finite, or all differences are zero.
        ValueError: If `n_components` is less than 1.
    """
    n = len(chosen)
    width, squares, sample = _first_pass(chosen, rejected, n, wants_sample=n_components is not None)
    if reference_head is not None and reference_head.shape != (width,):
        raise RewardModelError(
            f"reference_head of shape {tuple(reference_head.shape)} must be ({width},), one number per feature."
        )
    if not bool((squares > 0).any()):
        raise RewardModelError(
            "Chosen and rejected features are equal in every pair, so they show no preference; check that "
            "the two sides were not embedded from the same column."
        )
    # One row with the root mean squares as entries has exactly the scales wanted.
    root_mean_squares = (squares / n).sqrt().float()[None]
    scales = column_scales(root_mean_squares)
    if not standardize:
        scales = torch.full_like(scales, float(root_mean_squares.square().mean().sqrt()))
    components = None
    if n_components is not None:
        if not 1 <= n_components <= width:
            raise RewardModelError(f"n_components={n_components} must be from 1 to the {width} features.")
        generator = torch.Generator().manual_seed(seed)
        found = leading_components(sample / scales, n_components=n_components, tol=1e-2, generator=generator)
        components = found.components
    reference = torch.zeros(width) if reference_head is None else reference_head.detach().float().cpu()
    differences = torch.empty(n, width if components is None else len(components))
    offsets = torch.empty(n)
    onto = None if components is None else torch.cat([components / scales, reference[None]])
    for start, part in difference_chunks(chosen, rejected):
        rows = slice(start, start + len(part))
        if onto is None:
            offsets[rows] = part @ reference
            torch.div(part, scales, out=differences[rows])
        else:
            coordinates = part @ onto.mT
            offsets[rows], differences[rows] = coordinates[:, -1], coordinates[:, :-1]
    temperature = _temperature(offsets) if reference_head is not None else 1.0
    total_variance = float(differences.square().mean(dim=0).sum())
    preparation = Preparation(scales, components, temperature * reference, total_variance)
    return PreparedPairs(differences, temperature * offsets, preparation)


def _first_pass(chosen: Features, rejected: Features, n: int, *, wants_sample: bool) -> tuple[int, Tensor, Tensor]:
    """Width, sums of squares of each feature, and evenly spread rows."""
    squares, rows = torch.zeros(0, dtype=torch.float64), []
    stride = max(1, n // SAMPLE_ROWS)
    for start, part in difference_chunks(chosen, rejected):
        of_part = torch.linalg.vector_norm(part, dim=0).double().square()
        squares = squares + of_part if len(squares) else of_part
        if wants_sample:
            rows.append(part[-start % stride :: stride].clone())
    return len(squares), squares, torch.cat(rows) if rows else torch.zeros(0, len(squares))


def _temperature(offsets: Tensor) -> float:
    """The number that the reference margins are best multiplied by: a fit of one coefficient, weakly held to [0, 10]."""
    size = float(offsets.square().mean().sqrt())
    if size == 0:
        return 1.0
    fit = fit_joint(
        (offsets / size)[:, None],
        torch.zeros(len(offsets), dtype=torch.long),
        n_users=1,
        n_basis=1,
        offsets=torch.zeros_like(offsets),
        prior=JointPrior(0.1, 0.1, 1.0),
        generator=torch.Generator(),
    )
    # A reference that the data contradict is dropped, not turned round.
    return max(0.0, float(fit.deviations[0, 0])) / size
