"""EigenLoRA: trained coefficients on frozen principal components."""

from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.eigenlora.model import EigenLoraModel

__all__ = ["EigenLoraConfig", "EigenLoraModel"]
