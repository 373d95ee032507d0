"""Principal subspaces, their controls, and stores of adapters in them: the artifacts."""

from eigenpeft.deprecation import moved_names
from eigenpeft.subspace.controls import mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.subspace.core import Coefficients, Core
from eigenpeft.subspace.cores import CORES, CoreKind, core_kind
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.stores.member import AdapterMember
from eigenpeft.subspace.stores.store import AdapterStore

__all__ = [
    "CORES",
    "AdapterMember",
    "AdapterStore",
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

__getattr__ = moved_names(
    __name__,
    {"CoefficientStore": "eigenpeft.AdapterStore", "SubspaceBuilder": "eigenpeft.SubspaceBuilder"},
)
