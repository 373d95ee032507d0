"""Adapters as files: plain LoRA, export, the papers' own checkpoints."""
