"""Building a subspace from a collection of adapters."""

from eigenpeft.building.builder import SubspaceBuilder, build_subspace
from eigenpeft.building.sharing import build_shared_subspace

__all__ = ["SubspaceBuilder", "build_shared_subspace", "build_subspace"]
