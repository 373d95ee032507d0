"""Controls: what a subspace must beat before anyone believes in it."""

from dataclasses import replace

import torch

from eigenpeft.errors import SubspaceError
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


def shuffled_subspace(*, like: PrincipalSubspace) -> PrincipalSubspace:
    """The same bases, each in another module of the same shape: keeps everything but where a direction was learnt.

    If it does as well as the subspace itself, what helps is not particular to the module.

    Args:
        like: Subspace whose modules of one shape hand their bases on, each to the next.

    Raises:
        SubspaceError: If a module has a shape that no other has, so that there is nothing to exchange it with.
    """
    by_shape: dict[tuple[int, int, int], list[str]] = {}
    for name, bases in like.items():
        by_shape.setdefault((bases.out_features, bases.in_features, bases.n_components), []).append(name)
    alone = [names[0] for names in by_shape.values() if len(names) == 1]
    if alone:
        raise SubspaceError(
            f"{len(alone)} modules, such as {alone[0]!r}, have a shape and number of components that no other module has; "
            "shuffle a subspace of modules that come in pairs at least."
        )
    taken_from = {name: names[i - 1] for names in by_shape.values() for i, name in enumerate(names)}
    modules = {name: like[taken_from[name]] for name in like.modules}
    return PrincipalSubspace(modules, info=replace(like.info, method="shuffled"))
