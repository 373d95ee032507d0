"""Building a subspace from a collection of adapters."""

from eigenpeft.building.builder import SubspaceBuilder

__all__ = ["SubspaceBuilder"]
