"""Methods of the study: how each adapts the base, and the learning rates tried for it (four each, the same budget)."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from eigenpeft import EigenLoraConfig, MosLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.methods import FEW_PARAMETER_LAYERS
from eigenpeft.subspace import random_subspace

TARGETS = ["query", "value"]
COEFFICIENT_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
VERA_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
HEAD_RATES = (3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Method:
    """One way to adapt the base.

    `adapt(base, sources, seed)` makes the trainable model; `sources` are the zoo without the target's own adapter.
    """

    name: str
    rates: tuple[float, ...]
    adapt: Callable[[PreTrainedModel, AdapterCollection, int], nn.Module]


def head_only(base, sources, seed):
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    return base


def subspace_of(sources: AdapterCollection, *, fit: str, n_components: int) -> PrincipalSubspace:
    return SubspaceBuilder(n_components, method=fit).fit(sources).subspace_


def eigenlora(fit: str = "balanced", *, n_components: int = 32, core: str = "low_rank", random: bool = False):
    def adapt(base, sources, seed):
        subspace = subspace_of(sources, fit=fit, n_components=n_components)
        if random:
            subspace = random_subspace(like=subspace, seed=seed)
        return get_peft_model(
            base, EigenLoraConfig(subspace=subspace, r=8, lora_alpha=16, core=core, task_type="SEQ_CLS")
        )

    return adapt


def plain(config_cls, **settings):
    def adapt(base, sources, seed):
        return get_peft_model(base, config_cls(task_type="SEQ_CLS", target_modules=TARGETS, **settings))

    return adapt


METHODS = {
    method.name: method
    for method in (
        Method("head only", HEAD_RATES, head_only),
        Method("random subspace, low_rank", COEFFICIENT_RATES, eigenlora(random=True)),
        Method("EigenLoRA balanced, low_rank", COEFFICIENT_RATES, eigenlora()),
        Method("EigenLoRA eigenlorax, low_rank", COEFFICIENT_RATES, eigenlora("eigenlorax")),
        Method("EigenLoRA hosvd, low_rank", COEFFICIENT_RATES, eigenlora("hosvd")),
        Method("random subspace, mixer", COEFFICIENT_RATES, eigenlora(core="mixer", random=True)),
        Method("EigenLoRA balanced, mixer", COEFFICIENT_RATES, eigenlora(core="mixer")),
        Method("EigenLoRA balanced, diagonal", COEFFICIENT_RATES, eigenlora(core="diagonal")),
        # r = 1 on four of the six layers: 8 modules x 768 = 6,144 parameters, as EigenLoRA low_rank has.
        Method(
            "LoRA, equal parameters",
            LORA_RATES,
            plain(LoraConfig, r=1, lora_alpha=2, layers_to_transform=FEW_PARAMETER_LAYERS),
        ),
        Method("LoRA r8", LORA_RATES, plain(LoraConfig, r=8, lora_alpha=16)),
        Method("MoSLoRA r8", LORA_RATES, plain(MosLoraConfig, r=8, lora_alpha=16)),
        Method("VeRA r256", VERA_RATES, plain(VeraConfig, r=256)),
    )
}
