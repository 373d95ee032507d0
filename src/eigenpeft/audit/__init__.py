"""What can be done with adapters: compress them, train a new task from them, reuse one; measured, beside chance."""

from eigenpeft.audit.answers import Chance, Compress, CompressRow, Reuse, Train
from eigenpeft.audit.calibration import Calibration, load_calibration
from eigenpeft.audit.controls import nearest_adapter, same_parameters_lora
from eigenpeft.audit.gradient import GradientShare, ModuleGradient, gradient_share
from eigenpeft.audit.report import AuditReport, Curve, ModuleAudit
from eigenpeft.audit.reuse import Downhill, downhill
from eigenpeft.audit.run import audit_adapters
from eigenpeft.audit.task_gradients import gather_tokens

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
    "Train",
    "audit_adapters",
    "downhill",
    "gather_tokens",
    "gradient_share",
    "load_calibration",
    "nearest_adapter",
    "same_parameters_lora",
]
