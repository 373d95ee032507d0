"""Principal subspaces, their controls, and stores of coefficients on them: the artifacts."""

from eigenpeft.deprecation import moved_names
from eigenpeft.subspace.controls import mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.subspace.cores import CORES, Coefficients, Core, CoreKind, core_kind
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.store import CoefficientStore

__all__ = [
    "CORES",
    "CoefficientStore",
    "Coefficients",
    "Core",
    "CoreKind",
    "ModuleSubspace",
    "PrincipalSubspace",
    "SubspaceInfo",
    "core_kind",
    "mean_only_subspace",
    "random_subspace",
    "shuffled_subspace",
]

__getattr__ = moved_names(__name__, {"SubspaceBuilder": "eigenpeft.SubspaceBuilder"})
