"""Is there anything to recycle? Measured on the adapters alone, beside what chance would give."""

from eigenpeft.audit.controls import nearest_adapter, same_parameters_lora
from eigenpeft.audit.gradient import GradientShare, ModuleGradient, gradient_share
from eigenpeft.audit.report import AuditReport, Curve, ModuleAudit
from eigenpeft.audit.run import audit_adapters

__all__ = [
    "AuditReport",
    "Curve",
    "GradientShare",
    "ModuleAudit",
    "ModuleGradient",
    "audit_adapters",
    "gradient_share",
    "nearest_adapter",
    "same_parameters_lora",
]
