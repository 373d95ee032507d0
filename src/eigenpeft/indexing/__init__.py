"""Which adapter? From a few rows of a task to the names of the adapters for it, and how sure that is."""

from eigenpeft.indexing.answers import IndexAnswer, Match
from eigenpeft.indexing.encoder import BaseModelEncoder
from eigenpeft.indexing.index import AdapterIndex, build_index

__all__ = ["AdapterIndex", "BaseModelEncoder", "IndexAnswer", "Match", "build_index"]
