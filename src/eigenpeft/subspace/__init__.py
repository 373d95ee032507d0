"""Principal subspaces: the artifact, its builder, and stores of coefficients on it."""

from eigenpeft.subspace.builder import SubspaceBuilder
from eigenpeft.subspace.controls import mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import Coefficients, ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.store import CoefficientStore

__all__ = [
    "CoefficientStore",
    "Coefficients",
    "ModuleSubspace",
    "PrincipalSubspace",
    "SubspaceBuilder",
    "SubspaceInfo",
    "mean_only_subspace",
    "random_subspace",
    "shuffled_subspace",
]
