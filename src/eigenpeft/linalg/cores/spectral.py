"""Parts of a core that rules on singular values share: its triplets without rounding noise, the polar factor, checked weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.factored import FactoredSvd

# A rule that raises small singular values would raise rounding noise as well, whose directions are arbitrary: values below
# this share of the largest are not there. Factors in float32 that span one subspace differ by less.
NOISE = 1e-6


def triplets(core: Float[Tensor, "a b"], *, most: int | None = None, noise: float = NOISE) -> FactoredSvd:
    """Singular triplets of a core, leading first, without those whose values are rounding noise.

    Args:
        core: Any matrix.
        most: Keep at most so many; None keeps all.
        noise: Leave out values that are not above this share of the largest.

    Returns:
        `FactoredSvd` with at most min(a, b) triplets, none for a core of zeros.

    Example:
        >>> import torch
        >>> triplets(torch.diag(torch.tensor([2.0, 1.0, 0.0]))).S.tolist()
        [2.0, 1.0]
    """
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    rank = count_present(values, noise=noise)
    kept = rank if most is None else min(most, rank)
    return FactoredSvd(U=left[:, :kept], S=values[:kept], Vh=right[:kept])


def count_present(values: Float[Tensor, " k"], *, noise: float) -> int:
    """How many singular values are above a share of the largest.

    Args:
        values: Not negative.
        noise: The share.
    """
    return int(values.gt(noise * values.max()).sum()) if len(values) else 0


def common_ranks(cores: Float[Tensor, "t k_out k_in"]) -> tuple[int, int]:
    """How many directions the updates span together on the output and on the input side, rounding noise left out.

    Axes that are there only because float32 factors of one subspace were rounded apart must not count as room for more
    directions.

    Args:
        cores: Updates on common axes; each counts at unit norm.

    Example:
        >>> import torch
        >>> common_ranks(torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0]))]))
        (1, 1)
    """
    norms = torch.linalg.vector_norm(cores, dim=(1, 2))
    unit = cores / norms.where(norms > 0, 1.0)[:, None, None]
    ranks = []
    for sides in (unit, unit.mT):
        squared_norms = torch.linalg.eigvalsh((sides @ sides.mT).sum(dim=0)).clamp(min=0.0)
        ranks.append(count_present(squared_norms, noise=NOISE**2))
    return ranks[0], ranks[1]


def polar(columns: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    """The orthonormal polar factor `U Vᵀ` of `X = U S Vᵀ`: of all matrices with orthonormal columns the nearest to X.

    Where columns depend on each other, only directions that are there are kept (a partial isometry).

    Args:
        columns: X, tall or wide.

    Example:
        >>> import torch
        >>> polar(torch.diag(torch.tensor([3.0, 0.5]))).diagonal()
        tensor([1., 1.])
    """
    parts = triplets(columns)
    return parts.U @ parts.Vh


def weighted(
    cores: Float[Tensor, "t k_out k_in"], weights: Float[Tensor, " t"] | Sequence[float] | None
) -> Float[Tensor, "t k_out k_in"]:
    """`w_t M_t`: a weight scales the update itself, in every rule; a negative one turns it around.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.

    Raises:
        ValueError: If there are more or fewer weights than updates, or one is not finite.

    Examples:
        >>> import torch
        >>> weighted(torch.ones(2, 1, 1), [1.0, -0.5]).flatten().tolist()
        [1.0, -0.5]
    """
    if weights is None:
        return cores
    factors = torch.as_tensor(weights, dtype=cores.dtype, device=cores.device)
    if factors.shape != (len(cores),) or not factors.isfinite().all():
        raise ValueError(
            f"weights={factors.tolist()} do not fit {len(cores)} updates; pass one finite number for each."
        )
    return factors[:, None, None] * cores
