"""Is there anything to recycle? Measured on the adapters alone, beside what chance would give."""

from eigenpeft.audit.report import AuditReport, Curve, ModuleAudit
from eigenpeft.audit.run import audit

__all__ = ["AuditReport", "Curve", "ModuleAudit", "audit"]
