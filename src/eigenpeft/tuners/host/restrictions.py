"""Refuses LoRA's options that our methods do not define, and ranks and scalings that no training writes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from eigenpeft.errors import AdapterConfigError

_MOST_RANK = 4
_PLAIN_STARTS = (True, False, "gaussian")
# Layers that take the inputs otherwise, or no factors of their own. EVA is loaded after the model is made, by code of PEFT's
# that makes every layer whose rank changes anew, as plain LoRA.
_UNSUPPORTED = ("use_qalora", "arrow_config", "megatron_config", "eva_config")


def check_lora_options(
    config: LoraConfig, *, method: str, starts: Sequence[str] = (), unsupported: Sequence[str] = ()
) -> None:
    """Refuse the LoRA variants and starts that the method does not define.

    Args:
        config: Configuration with LoRA's fields.
        method: What messages call it.
        starts: Further values of `init_lora_weights` that the method takes, by what they begin with.
        unsupported: Further fields that must be unset.

    Raises:
        AdapterConfigError: One message with every field that cannot stay.
    """
    problems = [
        f"{name}={getattr(config, name)!r} is not supported; leave it out"
        for name in (*_UNSUPPORTED, *unsupported)
        if getattr(config, name, None)
    ]
    if config.init_lora_weights not in _PLAIN_STARTS and not str(config.init_lora_weights).lower().startswith(
        tuple(starts)
    ):
        problems.append(
            f"init_lora_weights={config.init_lora_weights!r} must be one of "
            f"{', '.join(map(repr, (*_PLAIN_STARTS, *starts)))}: other starts write A and B in a way that is not defined here"
        )
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(f"r={config.r!r} must be a whole number of at least 1")
    if not _is_number(config.lora_alpha) or not math.isfinite(config.lora_alpha):
        problems.append(f"lora_alpha={str(config.lora_alpha)[:40]} must be a finite number")
    if problems:
        raise AdapterConfigError(f"{method} cannot be set up as asked: {'; '.join(problems)}.")


def check_sizes(
    model: nn.Module, *, r: Any, rank_pattern: Mapping[str, Any] | None, alpha_pattern: Mapping[str, Any] | None
) -> None:
    """Refuse the ranks and scalings of an adapter's file that no training writes, before memory is taken for them.

    Args:
        model: Model to adapt.
        r: Rank that the file names.
        rank_pattern: Ranks by pattern, or None.
        alpha_pattern: Alphas by pattern, or None.

    Raises:
        AdapterConfigError: If a rank is not a whole number of at least 1, or more than four times the model's largest width (a
            converted start has twice the rank of the adapter); or an alpha is not a finite number.
    """
    most = _MOST_RANK * max((max(value.shape) for value in model.parameters() if value.ndim > 1), default=1)
    for name, rank in {"r": r, **(rank_pattern or {})}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
            raise AdapterConfigError(
                f"The adapter's file has the rank {str(rank)[:40]} ({str(name)[:80]!r}), which must be a whole number from 1 to "
                f"{most}, {_MOST_RANK} times the model's largest width. Get a fresh copy of the adapter."
            )
    for name, alpha in (alpha_pattern or {}).items():
        if not _is_number(alpha) or not math.isfinite(alpha):
            raise AdapterConfigError(
                f"The adapter's file has the alpha {str(alpha)[:40]} ({str(name)[:80]!r}), which must be a finite number. Get a "
                "fresh copy of the adapter."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
