"""DARE: drop random entries of each update and rescale the rest, then add up or elect signs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import weighted
from eigenpeft.linalg.rules.ties import Agreement, elect


def dare(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    drop: float = 0.5,
    seeds: Sequence[int] | None = None,
) -> Float[Tensor, "k_out k_in"]:
    """`M = Σ w_t M_t ∘ Z_t / (1 - p)` with `Z_t ~ Bernoulli(1 - p)`: Drop And REscale.

    Yu et al. (arXiv 2311.03099, abstract): drop delta parameters at random "with a ratio p" and rescale the remaining ones
    "by 1/(1-p)". There these are entries of the weights; here they are entries on the axes of the core space.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        drop: p, the share of entries to drop, at least 0 and below 1.
        seeds: Seed of each update's draw, so that it does not depend on the order; None for 0, 1, 2, ...

    Raises:
        ValueError: If an argument is out of range, or weights or seeds do not fit.

    Example:
        >>> import torch
        >>> merged = dare(torch.ones(1, 100, 100), drop=0.5)
        >>> sorted(set(merged.flatten().tolist())), abs(merged.mean().item() - 1.0) < 0.05
        ([0.0, 2.0], True)
    """
    return drop_entries(weighted(cores, weights), drop=drop, seeds=seeds).sum(dim=0)


def dare_ties(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    drop: float = 0.5,
    seeds: Sequence[int] | None = None,
    agreement: Agreement = "mean",
) -> Float[Tensor, "k_out k_in"]:
    """`dare`, its sum replaced by the election of signs of TIES.

    Drop And REscale (arXiv 2311.03099), then steps 2 and 3 of TIES (arXiv 2306.01708, algorithm 1): elect signs, merge those that
    agree. Nothing is trimmed.

    Args:
        cores: Updates on common axes.
        weights: As for `dare`.
        drop: As for `dare`.
        seeds: As for `dare`.
        agreement: As for `ties`.

    Raises:
        ValueError: As `dare` and `ties`.

    Example:
        >>> import torch
        >>> dare_ties(torch.stack([torch.ones(1, 2), -3 * torch.ones(1, 2)]), drop=0.0)  # the stronger sign is elected
        tensor([[-3., -3.]])
    """
    return elect(drop_entries(weighted(cores, weights), drop=drop, seeds=seeds), agreement=agreement)


def drop_entries(
    cores: Float[Tensor, "t k_out k_in"], *, drop: float, seeds: Sequence[int] | None = None
) -> Float[Tensor, "t k_out k_in"]:
    """Each update with random entries set to 0 and the others divided by the share that is left.

    Args:
        cores: Updates on common axes.
        drop: Share of entries to drop.
        seeds: Seed of each update.

    Raises:
        ValueError: If `drop` is out of range or the seeds do not fit.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop={drop} must be at least 0 and below 1: the share of the entries to drop.")
    seeds = range(len(cores)) if seeds is None else seeds
    if len(seeds) != len(cores):
        raise ValueError(f"{len(seeds)} seeds do not fit {len(cores)} updates; pass one for each.")
    draws = [torch.rand(cores.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    kept = torch.stack(draws).to(cores.device) >= drop
    return torch.where(kept, cores / (1.0 - drop), 0.0)
