"""Recycle LoRA adapters: principal subspaces, coefficient-only fine-tuning, exact export to plain LoRA.

Importing this package makes the methods EIGENLORA and MOSLORA known to PEFT.
"""

from eigenpeft.audit import audit_adapters
from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.combining import merge
from eigenpeft.deprecation import find_moved_modules, moved_names
from eigenpeft.errors import EigenPeftError
from eigenpeft.reward import LowRankRewardModel
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.tuners import AdapterBank, EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.version import __version__

find_moved_modules()
audit = audit_adapters  # The short name. `from eigenpeft.audit import ...` still finds the package.

__all__ = [
    "AdapterBank",
    "AdapterCollection",
    "AdapterStore",
    "EigenLoraConfig",
    "EigenPeftError",
    "LowRankRewardModel",
    "MosLoraConfig",
    "PrincipalSubspace",
    "SubspaceBuilder",
    "__version__",
    "audit_adapters",
    "export_lora",
    "merge",
]

__getattr__ = moved_names(__name__, {"CoefficientStore": "eigenpeft.AdapterStore", "TaskBank": "eigenpeft.AdapterBank"})
