"""What the demo compares: five ways to adapt the base, each with a learning rate of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from eigenpeft.subspace import PrincipalSubspace, random_subspace
from eigenpeft.tuners import EigenLoraConfig

RANK = 8
ALPHA = 16
N_COMPONENTS = 32
STEPS = 100
BATCH_SIZE = 32
TARGETS = ["query", "value"]
# LoRA of rank 1 on this many of the last layers has exactly as many parameters as EigenLoRA on all six:
# 8 modules x 768 = 12 modules x 2 x 32 x 8 = 6,144.
FEW_PARAMETER_LAYERS = [2, 3, 4, 5]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: What the table calls it.
        learning_rate: Of the adapter (of the head, where that is all there is): the best of several on rows held out of
            the shipped training rows (`benchmarks/learning_rates.py`).
        adapt: Makes the trainable model from the base and a seed.
    """

    name: str
    learning_rate: float
    adapt: Callable[[PreTrainedModel, int], nn.Module]


# Of the head in every method, chosen with the head alone: a head that lags behind would make any adapter look good.
HEAD_LEARNING_RATE = 3e-1


def methods(subspace: PrincipalSubspace) -> list[Method]:
    """The five methods, controls first.

    Args:
        subspace: Recycled from the shipped adapters.
    """
    lora = {"task_type": "SEQ_CLS", "target_modules": TARGETS}

    def head_only(base: PreTrainedModel, seed: int) -> nn.Module:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
        return base

    def in_random_subspace(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, _eigenlora(random_subspace(like=subspace, seed=seed)))

    def in_principal_subspace(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, _eigenlora(subspace))

    def few_parameters(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, LoraConfig(r=1, lora_alpha=2, layers_to_transform=FEW_PARAMETER_LAYERS, **lora))

    def same_rank(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, **lora))

    return [
        Method("head only", HEAD_LEARNING_RATE, head_only),
        Method("random subspace", 1e-2, in_random_subspace),
        Method("EigenLoRA", 1e-2, in_principal_subspace),
        Method("LoRA, equal parameters", 1e-2, few_parameters),
        Method("LoRA, equal rank", 3e-3, same_rank),
    ]


def _eigenlora(subspace: PrincipalSubspace) -> EigenLoraConfig:
    return EigenLoraConfig(subspace=subspace, r=RANK, lora_alpha=ALPHA, task_type="SEQ_CLS")
