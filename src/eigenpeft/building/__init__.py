"""Building a subspace from a collection of adapters."""

from eigenpeft.building.builder import SubspaceBuilder, build_subspace

__all__ = ["SubspaceBuilder", "build_subspace"]
