"""Trainers and callbacks: what TRL and transformers need beside the methods themselves."""
