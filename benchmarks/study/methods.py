"""Methods of the study: how each adapts the base, the subspace it trains in, and the learning rates tried for it."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from nearest import TARGETS, lora_with_factors
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from eigenpeft import EigenLoraConfig, MosLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.subspace import mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.tuners import same_parameters_lora

COEFFICIENT_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
HEAD_RATES = (3e-2, 1e-1, 3e-1, 1.0)
LATE_LAYERS = (3, 4, 5)
# LoRA of rank 1 on this many of the last layers has exactly as many parameters as EigenLoRA on all six:
# 8 modules x 768 = 12 modules x 2 x 32 x 8 = 6,144.
FEW_PARAMETER_LAYERS = [2, 3, 4, 5]
# Components of a module where the budget is shared out by explained share: 354 to 392 in all, against 12 x 32 = 384.
BUDGET_SHARE = 0.975


@dataclass(frozen=True)
class Situation:
    """What a method may look at before it trains.

    Attributes:
        sources: The zoo without the target's own adapter.
        seed: Of the cell.
        nearest: Finds the name of the source adapter whose frozen features suit the training rows best.
    """

    sources: AdapterCollection
    seed: int
    nearest: Callable[[], str]


Make = Callable[[Situation], PrincipalSubspace]


@dataclass(frozen=True)
class Method:
    """One way to adapt the base.

    Attributes:
        name: In rows and tables.
        rates: Learning rates tried on the tuning tasks.
        adapt: Makes the trainable model.
        subspace: What it trains in, if anything.
        tuned_as: The method whose chosen rate it takes, instead of trials of its own.
    """

    name: str
    rates: tuple[float, ...]
    adapt: Callable[[PreTrainedModel, Situation], nn.Module]
    subspace: Make | None = None
    tuned_as: str | None = None


def head_only(base, situation):
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    return base


def recycled(
    fit: str = "balanced", *, n_components=32, weighting: str = "equal", layers=None, n_sources=None, n_pseudo=0
) -> Make:
    def make(situation):
        names = random.Random(situation.seed).sample(situation.sources.names, n_sources or len(situation.sources))
        builder = SubspaceBuilder(
            n_components, method=fit, weighting=weighting, n_pseudo_components=n_pseudo, seed=situation.seed
        )
        subspace = builder.fit(situation.sources.subset(sorted(names))).subspace_
        if layers is None:
            return subspace
        kept = {name: bases for name, bases in subspace.items() if int(name.split(".layer.")[1][0]) in layers}
        return PrincipalSubspace(kept, info=subspace.info)

    return make


def random_like(make: Make) -> Make:
    return lambda situation: random_subspace(like=make(situation), seed=situation.seed)


def shuffled(make: Make) -> Make:
    return lambda situation: shuffled_subspace(make(situation), seed=situation.seed)


def mean_only(situation):
    return mean_only_subspace(situation.sources, n_components=32, progress=False)


def inside(
    name: str, make: Make, *, rates=(), tuned_as: str | None = None, r: int = 8, alpha: int = 16, warm=False, **settings
):
    """EigenLoRA in a subspace."""

    def adapt(base, situation):
        if warm:
            settings["init_from"] = situation.sources[situation.nearest()].source
        config = EigenLoraConfig(subspace=make(situation), r=r, lora_alpha=alpha, task_type="SEQ_CLS", **settings)
        return get_peft_model(base, config)

    return Method(name, rates, adapt, make, tuned_as)


def pair(kind: str, make: Make, *, twin_rate: bool = False, **settings) -> tuple[Method, Method]:
    """EigenLoRA in a recycled subspace, and its control: a random one of the same size, with trials of its own or, where
    `twin_rate`, at the rate chosen with the recycled one."""
    name = f"EigenLoRA {kind}"
    control = {**settings, "rates": (), "tuned_as": name} if twin_rate else settings
    return inside(name, make, **settings), inside(f"random subspace {kind}", random_like(make), **control)


def plain(name: str, config_cls, rates, tuned_as=None, **settings):
    settings.setdefault("target_modules", TARGETS)

    def adapt(base, situation):
        return get_peft_model(base, config_cls(task_type="SEQ_CLS", **settings))

    return Method(name, rates, adapt, tuned_as=tuned_as)


def few_late(kind: str, *, r: int, rates=(), tuned_as: str | None = None) -> Method:
    """A LoRA of as many parameters as `kind` has, on the last four layers."""
    name, layers = f"{FEW} to {kind}", FEW_PARAMETER_LAYERS
    return plain(name, LoraConfig, rates, tuned_as, r=r, lora_alpha=2 * r, layers_to_transform=layers)


def few_spread(make: Make):
    """A LoRA of as many parameters as `same_parameters_lora` spreads it: rank 1 on evenly spaced modules."""

    def adapt(base, situation):
        config = same_parameters_lora(make(situation), r=8, place="spread")
        config.task_type = "SEQ_CLS"
        return get_peft_model(base, config)

    return adapt


def nearest_frozen(base, situation):
    """The suited source adapter as it is, and a head: what copying does."""
    model = lora_with_factors(base, situation.sources, situation.nearest())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name and "original_module" not in name)
    return model


def nearest_continued(base, situation):
    """LoRA r 8 that starts from the suited source adapter: what the warm start does without a subspace."""
    return lora_with_factors(base, situation.sources, situation.nearest())


OURS, RANDOM, FEW = "EigenLoRA balanced, low_rank", "random subspace, low_rank", "LoRA, equal parameters"
# Rank 1 on the last two or four modules of the network: 1,536 and 3,072 parameters, as K = 8 and K = 16 have.
LAST_FOUR = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (4, 5) for name in TARGETS]
LAST_TWO = LAST_FOUR[2:]
VALUES = [f"bert.encoder.layer.{i}.attention.self.value" for i in (2, 5)]  # as many parameters as LAST_TWO

METHODS = {
    method.name: method
    for method in (
        Method("head only", HEAD_RATES, head_only),
        inside(RANDOM, random_like(recycled()), rates=COEFFICIENT_RATES),
        inside(OURS, recycled(), rates=COEFFICIENT_RATES),
        # r = 1 on four of the six layers: 8 modules x 768 = 6,144 parameters, as EigenLoRA low_rank has.
        plain(
            FEW,
            LoraConfig,
            LORA_RATES,
            r=1,
            lora_alpha=2,
            layers_to_transform=FEW_PARAMETER_LAYERS,
        ),
        plain("LoRA r8", LoraConfig, LORA_RATES, r=8, lora_alpha=16),
        # The number of components, with a control and a LoRA of equal parameters each.
        *pair("K=8", recycled(n_components=8), rates=(1e-2, 3e-2, 6e-2)),
        plain(
            "LoRA, equal parameters to K=8", LoraConfig, (3e-3, 1e-2, 3e-2), r=1, lora_alpha=2, target_modules=LAST_TWO
        ),
        plain(
            "LoRA, equal parameters to K=8, on values",
            LoraConfig,
            (),
            "LoRA, equal parameters to K=8",
            r=1,
            lora_alpha=2,
            target_modules=VALUES,
        ),
        Method(
            "LoRA, equal parameters to K=8, spread",
            (),
            few_spread(recycled(n_components=8)),
            tuned_as="LoRA, equal parameters to K=8",
        ),
        *pair("K=64", recycled(n_components=64), rates=(3e-3, 1e-2, 3e-2)),
        few_late("K=64", r=2, rates=(3e-3, 1e-2)),
        inside("EigenLoRA K by budget", recycled(n_components=BUDGET_SHARE), tuned_as=OURS),
        # A start from another task, and what it does without a subspace.
        inside("EigenLoRA warm start", recycled(), rates=(1e-2, 3e-2), warm=True),
        Method("nearest adapter, frozen", (1.0,), nearest_frozen),
        Method("nearest adapter, LoRA continued", (3e-3,), nearest_continued),
        # The way of fitting, in the same number of components: one control for all of them.
        inside("EigenLoRA eigenlorax", recycled("eigenlorax"), tuned_as=OURS),
        inside("EigenLoRA hooi", recycled("hooi"), tuned_as=OURS),
        inside("EigenLoRA energy", recycled(weighting="none"), tuned_as=OURS),
        inside("shuffled subspace", shuffled(recycled()), tuned_as=OURS),
        inside("mean-only subspace", mean_only, tuned_as=OURS),
        # Core, alpha, place.
        *pair("mixer", recycled(), rates=(1e-2, 3e-2), core="full"),
        *pair("diagonal", recycled(), rates=(3e-2, 1e-1), core="diagonal"),
        *pair("alpha=64", recycled(), rates=(3e-3, 1e-2), alpha=64, twin_rate=True),
        # No LoRA is as small as "diagonal" (384): rank 1 on the last module has 768.
        plain(
            "LoRA, rank 1 on one module",
            LoraConfig,
            (1e-2, 3e-2),
            r=1,
            lora_alpha=2,
            target_modules=LAST_TWO[1:],
        ),
        *pair("r=2", recycled(), rates=(1e-2, 3e-2, 1e-1), r=2, alpha=4),  # the same scaling as r = 8 with alpha 16
        *pair("r=32", recycled(), rates=(3e-3, 1e-2, 3e-2), r=32, alpha=64),
        few_late("r=32", r=4, tuned_as=FEW),
        *pair("late layers", recycled(layers=LATE_LAYERS), tuned_as=OURS),
        plain("MoSLoRA r8", MosLoraConfig, (1e-3, 3e-3), r=8, lora_alpha=16),
        plain("VeRA r256", VeraConfig, (1e-2, 3e-2), r=256),
        inside("EigenLoRA hosvd", recycled("hosvd"), tuned_as=OURS),
        # The number of source adapters, drawn by seed, in components that two can fill.
        *pair("K=16", recycled(n_components=16), tuned_as=OURS),
        plain("LoRA, equal parameters to K=16", LoraConfig, (), FEW, r=1, lora_alpha=2, target_modules=LAST_FOUR),
        inside("EigenLoRA K=16, 2 sources", recycled(n_components=16, n_sources=2), tuned_as=OURS),
        inside("EigenLoRA K=16, 5 sources", recycled(n_components=16, n_sources=5), tuned_as=OURS),
        # EigenLoRAx's own recipe for few adapters: raw rows of two, random directions to fill up.
        inside(
            "EigenLoRA paper's protocol",
            recycled("eigenlorax", n_components=16, n_sources=2, n_pseudo=16),
            tuned_as=OURS,
        ),
    )
}
