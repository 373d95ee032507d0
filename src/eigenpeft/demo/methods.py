"""What the demo compares: six ways to a new customer's classifier, each with learning rates of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from eigenpeft.combining import MergedAdapter
from eigenpeft.subspace import PrincipalSubspace, random_subspace
from eigenpeft.tuners import EigenLoraConfig

RANK = 8
ALPHA = 16
N_COMPONENTS = 8
STEPS = 40
BATCH_SIZE = 16
TARGETS = ["query", "value"]
OURS = "EigenLoRA"


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: What the table calls it.
        learning_rate: Learning rate of the adapter. The rates were chosen on customers that are neither here nor among the adapters
            (`benchmarks/regimes`, stage "tune").
        head_learning_rate: Learning rate of the head. One that learns as fast as it does alone leaves an adapter nothing to do.
        adapt: Makes the trainable model from the base and a seed.
    """

    name: str
    learning_rate: float
    head_learning_rate: float
    adapt: Callable[[PreTrainedModel, int], nn.Module]


def methods(subspace: PrincipalSubspace, merged: MergedAdapter) -> list[Method]:
    """The six methods, controls first.

    Args:
        subspace: Subspace of the related adapters.
        merged: Their merged update.

    Raises:
        AdapterConfigError: If the merge cannot be added to the base model, when a method is made.
    """
    lora = {"task_type": "SEQ_CLS", "target_modules": TARGETS}
    # Rank 1 on the last layer's two modules has as many numbers as EigenLoRA on all twelve: 2 x 768 = 12 x 2 x 8 x 8.
    few = {**lora, "layers_to_transform": [5]}

    def head_only(base: PreTrainedModel, seed: int) -> nn.Module:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
        return base

    def merged_start(base: PreTrainedModel, seed: int) -> nn.Module:
        merged.apply_to(base)
        return head_only(base, seed)

    def in_random_subspace(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, _eigenlora(random_subspace(like=subspace, seed=seed)))

    def in_principal_subspace(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, _eigenlora(subspace))

    def few_parameters(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, LoraConfig(r=1, lora_alpha=2, **few))

    def same_rank(base: PreTrainedModel, seed: int) -> nn.Module:
        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, **lora))

    return [
        Method("head alone", 1.0, 1.0, head_only),
        Method("merged update, head alone", 1.0, 1.0, merged_start),
        Method("random subspace", 1e-2, 1e-1, in_random_subspace),
        Method(OURS, 1e-2, 1e-1, in_principal_subspace),
        Method("LoRA, equal parameters", 1e-2, 1e-1, few_parameters),
        Method("LoRA, equal rank", 3e-3, 1e-1, same_rank),
    ]


def _eigenlora(subspace: PrincipalSubspace) -> EigenLoraConfig:
    return EigenLoraConfig(subspace=subspace, r=RANK, lora_alpha=ALPHA, task_type="SEQ_CLS")
