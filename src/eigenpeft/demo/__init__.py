"""The demo: ten shipped adapters recycled for a task that none of them saw, beside its controls."""

from eigenpeft.demo.assets import shipped_adapters

__all__ = ["shipped_adapters"]
