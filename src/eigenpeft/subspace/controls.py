"""Controls: what a subspace must beat before anyone believes in it."""

from dataclasses import replace

import torch

from eigenpeft.linalg.orthogonal import orthonormal_rows
from eigenpeft.subspace.builder import seeded_generator
from eigenpeft.subspace.principal import ModuleSubspace, PrincipalSubspace


def random_subspace(*, like: PrincipalSubspace, seed: int = 0) -> PrincipalSubspace:
    """Uniformly random orthonormal bases of the same sizes: as good as any subspace that learnt nothing.

    Args:
        like: Gives modules, widths and numbers of components.
        seed: Of the random directions; they depend on the module's name, not on its position.

    Returns:
        A subspace whose singular values and explained shares are zero, because nothing was fitted.
    """
    modules = {}
    for name, bases in like.items():
        sides = []
        for side, width in (("in", bases.in_features), ("out", bases.out_features)):
            gaussian = torch.randn(bases.n_components, width, generator=seeded_generator(seed, name, f"random {side}"))
            sides.append(orthonormal_rows(gaussian))
        nothing = torch.zeros(bases.n_components)
        modules[name] = ModuleSubspace(sides[0], sides[1], nothing, nothing.clone(), nothing.clone())
    info = replace(like.info, method="random", sources=(), measured_on=(), seed=seed, n_pseudo_components=0)
    return PrincipalSubspace(modules, info=info)
