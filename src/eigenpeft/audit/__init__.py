"""What can be done with adapters: compress them, train a new task from them, reuse one; measured, beside chance.

The package can be called: `eigenpeft.audit(collection)` is short for `audit_adapters(collection)`.
"""

import sys
from types import ModuleType
from typing import Any

from eigenpeft.audit.adapters.sharing import Sharing, SharingRow
from eigenpeft.audit.answers import Chance, Compress, CompressRow, Reuse, Train
from eigenpeft.audit.controls import nearest_adapter
from eigenpeft.audit.report import AuditReport, Curve, ModuleAudit
from eigenpeft.audit.run import audit_adapters
from eigenpeft.audit.task.calibration import Calibration, load_calibration
from eigenpeft.audit.task.gradient import GradientShare, ModuleGradient, gradient_share
from eigenpeft.audit.task.reuse import Downhill, downhill, nearest_adapters
from eigenpeft.audit.task.task_gradients import gather_tokens
from eigenpeft.deprecation import moved_names

__all__ = [
    "AuditReport",
    "Calibration",
    "Chance",
    "Compress",
    "CompressRow",
    "Curve",
    "Downhill",
    "GradientShare",
    "ModuleAudit",
    "ModuleGradient",
    "Reuse",
    "Sharing",
    "SharingRow",
    "Train",
    "audit_adapters",
    "downhill",
    "gather_tokens",
    "gradient_share",
    "load_calibration",
    "nearest_adapter",
    "nearest_adapters",
]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> AuditReport:
        return audit_adapters(*args, **options)


__getattr__ = moved_names(__name__, {"same_parameters_lora": "eigenpeft.tuners.same_parameters_lora"})
sys.modules[__name__].__class__ = _CallablePackage
