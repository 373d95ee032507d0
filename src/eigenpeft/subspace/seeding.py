"""Random generators by name: what one module draws depends neither on other modules nor on their order."""

import hashlib

import torch


def seeded_generator(seed: int, module: str, purpose: str) -> torch.Generator:
    """A generator by module name, not by position: its numbers depend neither on other modules nor on their order.

    Args:
        seed: The user's.
        module: Module name.
        purpose: What the numbers are for, so that two uses never share them.
    """
    digest = hashlib.sha256(f"{seed}|{module}|{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
