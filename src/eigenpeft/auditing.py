"""The old place of `eigenpeft.audit`; every name warns and says where it is now."""

from eigenpeft.deprecation import moved_names

__path__: list[str] = []  # so that its modules are looked for, and found at their new places

__getattr__ = moved_names(
    __name__,
    {
        "audit": "eigenpeft.audit.audit_adapters",
        "AuditReport": "eigenpeft.audit.AuditReport",
        "Curve": "eigenpeft.audit.Curve",
        "GradientShare": "eigenpeft.audit.GradientShare",
        "ModuleAudit": "eigenpeft.audit.ModuleAudit",
        "ModuleGradient": "eigenpeft.audit.ModuleGradient",
        "gradient_share": "eigenpeft.audit.gradient_share",
        "nearest_adapter": "eigenpeft.audit.nearest_adapter",
        "same_parameters_lora": "eigenpeft.tuners.same_parameters_lora",
    },
)
