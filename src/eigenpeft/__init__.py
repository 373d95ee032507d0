"""Recycle LoRA adapters: principal subspaces, coefficient-only fine-tuning, exact export to plain LoRA."""

from eigenpeft.version import __version__

__all__ = ["__version__"]
