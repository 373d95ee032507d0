"""MoSLoRA: a trained mixer between LoRA's factors."""

from eigenpeft.tuners.moslora.config import MosLoraConfig
from eigenpeft.tuners.moslora.model import MosLoraModel

__all__ = ["MosLoraConfig", "MosLoraModel"]
