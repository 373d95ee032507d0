"""The demo: ten shipped adapters recycled for a task that none of them saw, beside its controls; and sixteen related ones."""

from eigenpeft.demo.assets import banking77, base_model, shipped_adapters
from eigenpeft.demo.related import NewCustomer, new_customer, related_adapters

__all__ = ["NewCustomer", "banking77", "base_model", "new_customer", "related_adapters", "shipped_adapters"]
