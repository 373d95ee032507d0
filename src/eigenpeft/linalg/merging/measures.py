"""What a merge did, in numbers of one module: distance to each source, over-counting, stable rank, share kept."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.factored import FactoredSvd
from eigenpeft.linalg.rules.svc import response


@dataclass(frozen=True, kw_only=True)
class MergeMeasures:
    """Measures of one module; squares and inner products add up over modules, so that a report can.

    Attributes:
        inner_products: ⟨ΔW_s, ΔW_t⟩; the diagonal holds ‖ΔW_t‖².
        distances: ‖ΔW - ΔW_t‖² of each source, ΔW cut off at its rank and scaled.
        squared_norm: ‖ΔW‖² before it is cut off.
        kept_squared_norm: Squared norm of the leading singular values that the rank keeps.
        largest: Largest singular value of ΔW.
        over_counting: Mean of SVC's responses over updates and the directions that the rank keeps, weighted by the directions'
            squared norm: 1 where the merged update is along its directions as strong as the updates are, more where they were
            counted repeatedly.
    """

    inner_products: Float[Tensor, "t t"]
    distances: Float[Tensor, " t"]
    squared_norm: float
    kept_squared_norm: float
    largest: float
    over_counting: float


def measure_merge(
    parts: FactoredSvd, *, cores: Float[Tensor, "t k_out k_in"], rank: int | None = None
) -> MergeMeasures:
    """Numbers of one merged module.

    Args:
        parts: Singular triplets of the merged update, scaled, before it is cut off.
        cores: The sources without weights, on the same axes.
        rank: Rank it is cut off at; None for no cut.

    Examples:
        >>> import torch
        >>> cores = torch.stack([torch.eye(2), torch.eye(2)]).double()
        >>> parts = FactoredSvd(*torch.linalg.svd(cores.mean(dim=0)))
        >>> measure_merge(parts, cores=cores, rank=1).distances.tolist()
        [1.0, 1.0]
    """
    squared_norms = parts.S.square()
    cut = FactoredSvd(parts.U[:, :rank], parts.S[:rank], parts.Vh[:rank])
    rows = cores.flatten(1)
    counted = response(cut, cores).clamp(min=0.0).mean(dim=0)
    kept = float(squared_norms[:rank].sum())
    return MergeMeasures(
        inner_products=rows @ rows.mT,
        distances=(rows - ((cut.U * cut.S) @ cut.Vh).flatten()).square().sum(dim=1),
        squared_norm=float(squared_norms.sum()),
        kept_squared_norm=kept,
        largest=float(parts.S[0]) if len(parts.S) else 0.0,
        over_counting=float((counted * squared_norms[:rank]).sum()) / kept if kept else 0.0,
    )
