"""Recycle LoRA adapters: principal subspaces, coefficient-only fine-tuning, exact export to plain LoRA.

Importing this package makes the methods EIGENLORA and MOSLORA known to PEFT.
"""

from eigenpeft.auditing import audit
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import EigenPeftError
from eigenpeft.reward import LowRankRewardModel
from eigenpeft.subspace import CoefficientStore, PrincipalSubspace, SubspaceBuilder
from eigenpeft.tuners import EigenLoraConfig, MosLoraConfig, TaskBank, export_lora
from eigenpeft.version import __version__

__all__ = [
    "AdapterCollection",
    "CoefficientStore",
    "EigenLoraConfig",
    "EigenPeftError",
    "LowRankRewardModel",
    "MosLoraConfig",
    "PrincipalSubspace",
    "SubspaceBuilder",
    "TaskBank",
    "__version__",
    "audit",
    "export_lora",
]
