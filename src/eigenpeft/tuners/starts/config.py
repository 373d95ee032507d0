"""A LoRA configuration whose adapter starts at given factors; for PEFT it is a plain LoRA, on disk too."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors


class StartedLoraConfig(LoraConfig):
    """LoRA's own configuration, and beside its fields what the adapter starts at as soon as PEFT has put it into a model.

    Everything but the start is PEFT's: the adapter is plain LoRA in memory and on disk, and its file says nothing of the start.

    Attributes:
        start: `(B (out_features, q), A (q, in_features))` by module, with q at most the adapter's rank, zeros filling the rest;
            the adapter's scaling multiplies them. None for a start as LoRA's own.
    """

    start: Mapping[str, Factors] | None = None


def check_rank(r: Any) -> None:
    """Refuse what is no rank of a LoRA, before anything is computed with it.

    Args:
        r: LoRA's rank.

    Raises:
        AdapterConfigError: If it is not a whole number of at least 1.
    """
    if type(r) is not int or r < 1:
        raise AdapterConfigError(f"r={r!r} must be a whole number of at least 1: the rank of the LoRA.")
