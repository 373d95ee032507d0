"""Experimental: cores that a gate weighs anew for every token."""

from eigenpeft.tuners.gated.config import GatedLoraConfig
from eigenpeft.tuners.gated.model import GatedLoraModel

__all__ = ["GatedLoraConfig", "GatedLoraModel"]
