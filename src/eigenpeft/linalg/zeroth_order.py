"""Gradients from two values of a function: simultaneous perturbation, its direction redrawn from a seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def direction(values: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """Independent standard normal numbers z, the same for a seed on every device and in every process.

    Args:
        values: Give the shapes, dtypes and devices.
        seed: Any whole number.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype) for value in values
    ]


def projected_gradient(
    objective: Callable[[Sequence[Tensor]], float], values: Sequence[Tensor], *, epsilon: float, seed: int
) -> tuple[float, float]:
    """`g = (L(θ + εz) - L(θ - εz)) / 2ε`, the slope of L along z (SPSA: Spall, IEEE Trans. Autom. Control 37, 1992).

    `E[g z]` is the gradient up to O(ε²), with a variance that grows with the number of values (MeZO, arXiv 2305.17333). L may be
    any function of θ, also one that has no gradient.

    Args:
        objective: L; called twice, with values of these shapes.
        values: θ; not changed.
        epsilon: ε, the length of a step to each side, per value.
        seed: Seed of z; `direction(values, seed=seed)` gives it again.

    Returns:
        `(g, (L(θ + εz) + L(θ - εz)) / 2)`.

    Example:
        >>> import torch
        >>> theta = [torch.tensor([1.0, 2.0])]
        >>> slope, _ = projected_gradient(lambda t: float((3.0 * t[0]).sum()), theta, epsilon=0.1, seed=0)
        >>> bool(abs(slope - 3.0 * float(direction(theta, seed=0)[0].sum())) < 1e-4)
        True
    """
    moved = direction(values, seed=seed)
    ahead = objective([value + epsilon * z for value, z in zip(values, moved, strict=True)])
    behind = objective([value - epsilon * z for value, z in zip(values, moved, strict=True)])
    return (ahead - behind) / (2.0 * epsilon), (ahead + behind) / 2.0


def replay(values: Sequence[Tensor], seeds: Sequence[int], steps: Sequence[float]) -> list[Tensor]:
    """`θ_T = θ_0 - Σ_t a_t z_t`, one step after another, z_t redrawn from its seed: weights as a list of pairs of numbers.

    Whoever has θ_0 and the pairs gets the same bits ("Just One Byte", arXiv 2306.10015; FedKSeed, arXiv 2312.06353). With
    `a = η g` these are the steps of MeZO's descent.

    Args:
        values: θ_0; not changed.
        seeds: Seed of each z.
        steps: a of each.

    Raises:
        ValueError: If there are more of one than of the other.

    Example:
        >>> import torch
        >>> theta = [torch.zeros(2)]
        >>> there = replay(theta, [7], [0.5])
        >>> torch.equal(there[0], -0.5 * direction(theta, seed=7)[0])
        True
    """
    moved = [value.clone() for value in values]
    for seed, step in zip(seeds, steps, strict=True):
        for value, z in zip(moved, direction(values, seed=seed), strict=True):
            value.sub_(z, alpha=step)
    return moved
