"""Gradients from two values of a function: simultaneous perturbation, its direction redrawn from a seed."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Values = Sequence[Float[Tensor, "..."]]
"""Tensors of any shapes, such as the trained parameters of a model."""


def direction(values: Values, *, seed: int) -> list[Float[Tensor, "..."]]:
    """Independent standard normal numbers z, the same for a seed on every device and in every process.

    Args:
        values: Give the shapes, dtypes and devices.
        seed: Any whole number.

    Example:
        >>> import torch
        >>> theta = [torch.zeros(2, 3)]
        >>> torch.equal(direction(theta, seed=7)[0], direction(theta, seed=7)[0])
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype) for value in values
    ]


def directions(values: Values, *, seed: int, n: int) -> list[list[Float[Tensor, "..."]]]:
    """N directions at right angles to one another, each of length √d for d numbers in all, so that `E[z zᵀ] = I`.

    The mean of `g z` over d of them is the gradient up to O(ε²); over fewer, an estimate with less variance than independent
    directions have (random orthogonal matrices: Choromanski et al., "Structured Evolution with Compact Architectures", arXiv
    1804.02395). More than d of them are several such sets.

    Args:
        values: Give the shapes, dtypes and devices.
        seed: Any whole number.
        n: Their number; n · d numbers are held.

    Returns:
        Of each direction, one tensor per value.

    Examples:
        >>> import torch
        >>> one, two = directions([torch.zeros(3), torch.zeros(2, 2)], seed=0, n=2)
        >>> product = sum(float((a * b).sum()) for a, b in zip(one, two))
        >>> length = sum(float(a.square().sum()) for a in one) ** 0.5
        >>> abs(product) < 1e-5, round(length / 7**0.5, 5)
        (True, 1.0)
    """
    sizes = [value.numel() for value in values]
    d, generator = sum(sizes), torch.Generator().manual_seed(seed)
    sets = []
    for first in range(0, n, d):
        normal = torch.randn(d, min(d, n - first), generator=generator, dtype=torch.float64)
        axes, triangle = torch.linalg.qr(normal)
        sets.append(axes * triangle.diagonal().sign() * d**0.5)  # the signs make the axes uniform on the sphere
    return [
        [part.reshape(value.shape).to(value) for part, value in zip(z.split(sizes), values, strict=True)]
        for z in torch.cat(sets, dim=1).T
    ]


def slope_along(
    objective: Callable[[Values], float],
    values: Values,
    moved: Values,
    *,
    epsilon: float,
) -> tuple[float, float]:
    """`g = (L(θ + εz) - L(θ - εz)) / 2ε`, the slope of L along z.

    Args:
        objective: L; called twice, with values of these shapes.
        values: θ; not changed.
        moved: z.
        epsilon: ε, the length of a step to each side, per value.

    Returns:
        `(g, (L(θ + εz) + L(θ - εz)) / 2)`.

    Raises:
        ValueError: If there are more values on one side than on the other.

    Examples:
        >>> import torch
        >>> slope_along(lambda t: float(t[0] ** 2), [torch.tensor(3.0)], [torch.tensor(1.0)], epsilon=0.5)
        (6.0, 9.25)
    """
    ahead = objective([value + epsilon * z for value, z in zip(values, moved, strict=True)])
    behind = objective([value - epsilon * z for value, z in zip(values, moved, strict=True)])
    return (ahead - behind) / (2.0 * epsilon), (ahead + behind) / 2.0


def projected_gradient(
    objective: Callable[[Values], float], values: Values, *, epsilon: float, seed: int
) -> tuple[float, float]:
    """`slope_along` a standard normal direction (SPSA: Spall, IEEE Trans. Autom. Control 37, 1992).

    `E[g z]` is the gradient up to O(ε²), with a variance that grows with the number of values (MeZO, arXiv 2305.17333,
    definition 1 and equation 1). L may be any function of θ, also one that has no gradient.

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
    return slope_along(objective, values, direction(values, seed=seed), epsilon=epsilon)


def replay(values: Values, seeds: Sequence[int], steps: Sequence[float]) -> list[Float[Tensor, "..."]]:
    """`θ_T = θ_0 - Σ_t a_t z_t`, one step after another, z_t redrawn from its seed: weights as a list of pairs of numbers.

    Whoever has θ_0 and the pairs gets the same bits ("Just One Byte", arXiv 2306.10015; FedKSeed, arXiv 2312.06353). With
    `a = η g` these are the steps of MeZO's descent (arXiv 2305.17333, algorithm 1).

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
