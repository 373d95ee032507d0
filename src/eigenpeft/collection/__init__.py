"""Reading collections of LoRA adapters: lazily, checked, one module at a time."""

from eigenpeft.collection.adapter import AdapterFactors, SourceAdapter
from eigenpeft.collection.diagnosis import Diagnosis, Finding
from eigenpeft.collection.reader import AdapterCollection

__all__ = ["AdapterCollection", "AdapterFactors", "Diagnosis", "Finding", "SourceAdapter"]
