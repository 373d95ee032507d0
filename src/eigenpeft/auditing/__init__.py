"""Is there anything to recycle? Measured on the adapters alone, beside what chance would give."""

from eigenpeft.auditing.controls import nearest_adapter, same_parameters_lora
from eigenpeft.auditing.gradient import GradientShare, ModuleGradient, gradient_share
from eigenpeft.auditing.report import AuditReport, Curve, ModuleAudit
from eigenpeft.auditing.run import audit

__all__ = [
    "AuditReport",
    "Curve",
    "GradientShare",
    "ModuleAudit",
    "ModuleGradient",
    "audit",
    "gradient_share",
    "nearest_adapter",
    "same_parameters_lora",
]
