"""Learning rates to start from, per method and trainer: TRL's own defaults are for whole models and leave an adapter untrained."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

# Tuned on SmolLM2-135M for supervised tuning and reward models (benchmarks/smollm2.py); for "diagonal", which has so few
# numbers that each must move far, on all-MiniLM-L6-v2 (docs/study.md), a third of what was best there.
COEFFICIENTS = {"low_rank": 1e-2, "full": 1e-2, "mixer": 1e-2, "diagonal": 3e-2, "mixture": 3e-2}
FACTORS = 2e-3
# Of a trainer whose loss compares policies, relative to supervised tuning.
SHARES = {"sft": 1.0, "reward": 1.0, "dpo": 1 / 3, "kto": 1 / 3, "grpo": 1 / 3, "rloo": 1 / 3, "distillation": 1 / 3}
# A rate this many times smaller than the suggested one is worth a warning.
FAR_BELOW = 30.0


def suggested_learning_rate(
    trainer: str, *, peft_method: str = "eigenlora", core: str = "low_rank", control: str | None = None
) -> float:
    """A peak learning rate to start from. Tune it for each method, the controls included, before believing a difference.

    Args:
        trainer: "sft", "reward", "dpo", "kto", "grpo", "rloo" or "distillation".
        peft_method: "eigenlora", "moslora" or "lora".
        core: Core of EigenLoRA.
        control: A control of EigenLoRA ("random", "lora", ...), which is trained in its place.

    Returns:
        The rate, for Adam and a schedule that falls to zero.

    Raises:
        KeyError: If there is no such trainer or core.

    Examples:
        >>> suggested_learning_rate("sft", core="full"), suggested_learning_rate("sft", peft_method="lora")
        (0.01, 0.002)
    """
    plain = peft_method != "eigenlora" or control == "lora"
    return SHARES[trainer] * (FACTORS if plain else COEFFICIENTS[core])


def settle_learning_rate(arguments: Any, *, suggested: float, given: bool) -> None:
    """Put the suggested rate into training arguments that leave it open; warn where the user's own is far below.

    Args:
        arguments: A `TrainingArguments` of any kind; changed in place.
        suggested: From `suggested_learning_rate`.
        given: Whether the user named a rate.
    """
    if not given:
        logger.warning(
            "No --learning_rate was given: training starts at %.2g, which suits this adapter; TRL's own default, %.2g, is for "
            "whole models. Tune it, for the controls too.",
            suggested,
            arguments.learning_rate,
        )
        arguments.learning_rate = suggested
    elif arguments.learning_rate < suggested / FAR_BELOW:
        logger.warning(
            "--learning_rate %.2g is far below the %.2g that suits this adapter; so few numbers hardly move at it.",
            arguments.learning_rate,
            suggested,
        )
