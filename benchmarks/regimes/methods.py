"""Methods of the study: how each starts, what it trains, and the learning rates tried for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import zoos
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from eigenpeft import EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.subspace import random_subspace

LAST_TWO = [f"bert.encoder.layer.5.attention.self.{name}" for name in ("query", "value")]
HEAD_RATES = (3e-2, 1e-1, 3e-1, 1.0)
# Of the head where there is an adapter too: at the rate that suits the head alone it runs ahead, and nothing is left to adapt.
HEAD_RATE_BESIDE_ADAPTER = 1e-1
COEFFICIENT_RATES = (1e-2, 3e-2)
LORA_RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Situation:
    """What a method may look at: a part of a zoo, the seed; λ, weights of all adapters and the nearest one by held-out rows."""

    zoo: str
    size: int
    draw: int
    work: Path
    seed: int
    scale: Callable[[], float]
    nearest: Callable[[], str]
    weights: Callable[[], list[float]] = list
    modules: list[str] | str = field(default_factory=lambda: zoos.MODULES)

    @property
    def part(self) -> tuple[str, int, int, Path]:
        return self.zoo, self.size, self.draw, self.work


@dataclass(frozen=True)
class Method:
    """One way to train a new task.

    Attributes:
        name: In rows and tables.
        adapt: Makes the trainable model.
        rates: Learning rates tried on the tuning tasks.
        tuned_as: The method whose chosen rate it takes, instead of trials of its own.
        uses_zoo: Whether the adapters matter to it; a control that does not use them is run once for all zoos.
        merged: Whether it starts at the base plus λ times the mean update.
    """

    name: str
    adapt: Callable[[PreTrainedModel, Situation], nn.Module]
    rates: tuple[float, ...] = ()
    tuned_as: str | None = None
    uses_zoo: bool = True
    merged: bool = False


def head_only(base, situation):
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    return base


def lora(**settings):
    def adapt(base, situation):
        return get_peft_model(
            base, LoraConfig(task_type="SEQ_CLS", **{"target_modules": situation.modules, **settings})
        )

    return adapt


@lru_cache(maxsize=8)
def subspace_of(zoo: str, size: int, draw: int, work: Path, n_components: int) -> PrincipalSubspace:
    return SubspaceBuilder(n_components).fit(zoos.collection(zoo, size, draw, work)).subspace_


def recycled(situation: Situation, n_components: int) -> PrincipalSubspace:
    return subspace_of(*situation.part, n_components)


def eigenlora(n_components: int, *, random: bool = False, r: int = 8, **settings):
    def adapt(base, situation):
        subspace = recycled(situation, n_components)
        if random:
            subspace = random_subspace(like=subspace, seed=situation.seed)
        config = EigenLoraConfig(subspace=subspace, r=r, lora_alpha=2 * r, task_type="SEQ_CLS", **settings)
        return get_peft_model(base, config)

    return adapt


def add_mean(base: nn.Module, situation: Situation, scale: float) -> None:
    """W0 := W0 + λ · mean ΔW."""
    with torch.no_grad():
        for module, update in zoos.mean_update(*situation.part).items():
            base.get_submodule(module).weight.add_(update, alpha=scale)


def merged(then):
    def adapt(base, situation):
        add_mean(base, situation, situation.scale())
        return then(base, situation)

    return adapt


def lora_at(model: nn.Module, situation: Situation, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    """Set the factors of a LoRA r 8 with alpha 8."""
    for module, (lora_b, lora_a) in values.items():
        layer = model.base_model.model.get_submodule(module)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
    return model


def init_at_components(*, random: bool = False):
    """EigenLoRAx-INIT: LoRA r 8 whose A starts at the leading components of the input side, B at zero.

    The control starts at random directions, orthonormal too: LoRA's own A has shorter rows, so that the same rate moves it less.
    """

    def adapt(base, situation):
        model = lora(r=8, lora_alpha=16)(base, situation)
        bases = recycled(situation, 8)
        if random:
            bases = random_subspace(like=bases, seed=situation.seed)
        values = {name: (torch.zeros(each.out_features, 8), each.components_in) for name, each in bases.items()}
        return lora_at(model, situation, values)

    return adapt


def nearest_continued(base, situation):
    model, name = lora(r=8, lora_alpha=8)(base, situation), situation.nearest()
    found = zoos.factors(*situation.part)
    values = {module: next((b, a) for own, b, a in parts if own == name) for module, parts in found.items()}
    return lora_at(model, situation, values)


def nearest_frozen(base, situation):
    """W0 := W0 + ΔW of the nearest adapter, and a head on it."""
    name = situation.nearest()
    return with_weights(base, situation, {each: float(each == name) for each in names_of(situation)})


def names_of(situation: Situation) -> list[str]:
    return [name for name, _, _ in next(iter(zoos.factors(*situation.part).values()))]


def with_weights(base: nn.Module, situation: Situation, weights: dict[str, float]) -> nn.Module:
    """W0 := W0 + Σ_t w_t ΔW_t, frozen, and a head on it."""
    with torch.no_grad():
        for module, parts in zoos.factors(*situation.part).items():
            for name, b, a in parts:
                if weights[name]:
                    base.get_submodule(module).weight.add_(b @ a, alpha=weights[name])
    return head_only(base, situation)


def lorahub(base, situation):
    """Weights of all adapters by a gradient-free search (LoraHub, arXiv 2307.13269), and a head on them."""
    return with_weights(base, situation, dict(zip(names_of(situation), situation.weights(), strict=True)))


class Mixture(nn.Module):
    """A frozen linear layer plus Σ_t w_t ΔW_t, the weights w of one module, or those of all, trained from 1/T."""

    def __init__(self, base: nn.Module, parts: list[tuple[str, torch.Tensor, torch.Tensor]], weights: nn.Parameter):
        super().__init__()
        self.base, self.rank = base, parts[0][2].shape[0]
        self.register_buffer("b", torch.cat([b for _, b, _ in parts], dim=1))
        self.register_buffer("a", torch.cat([a for _, _, a in parts], dim=0))
        self.weights = weights

    def forward(self, x):
        return self.base(x) + (x @ self.a.mT * self.weights.repeat_interleave(self.rank)) @ self.b.mT


def random_like(parts: list, *, seed: int) -> list:
    """Adapters with random factors of the same sizes and the same norms ‖ΔW_t‖."""
    generator, found = torch.Generator().manual_seed(seed), []
    for name, b, a in parts:
        left, right = torch.randn(b.shape, generator=generator), torch.randn(a.shape, generator=generator)
        found.append((name, left * ((b @ a).norm() / (left @ right).norm()), right))
    return found


def mixture(*, shared: bool = False, random: bool = False):
    """The weights of all adapters by gradient: of each module's own, or shared by all modules."""

    def adapt(base, situation):
        head_only(base, situation)
        found = zoos.factors(*situation.part)
        number = len(next(iter(found.values())))
        one = nn.Parameter(torch.full((number,), 1.0 / number))
        for place, (module, parts) in enumerate(found.items()):
            parent, _, name = module.rpartition(".")
            used = random_like(parts, seed=1000 * situation.seed + place) if random else parts
            weights = one if shared else nn.Parameter(one.detach().clone())
            setattr(base.get_submodule(parent), name, Mixture(base.get_submodule(module), used, weights))
        return base

    return adapt


METHODS = {
    method.name: method
    for method in (
        Method("head", head_only, HEAD_RATES, uses_zoo=False),
        Method("LoRA r8", lora(r=8, lora_alpha=16), LORA_RATES, uses_zoo=False),
        Method("LoRA equal", lora(r=1, lora_alpha=2, target_modules=LAST_TWO), (1e-2, 3e-2, 1e-1), uses_zoo=False),
        Method("random K8", eigenlora(8, random=True), COEFFICIENT_RATES, uses_zoo=False),
        Method("EigenLoRA K8", eigenlora(8), COEFFICIENT_RATES),
        Method("merged, head", merged(head_only), tuned_as="head", merged=True),
        Method("merged, LoRA r8", merged(lora(r=8, lora_alpha=16)), tuned_as="LoRA r8", merged=True),
        Method("merged, EigenLoRA K8", merged(eigenlora(8)), tuned_as="EigenLoRA K8", merged=True),
        Method("LoRA r1", lora(r=1, lora_alpha=2), (3e-3, 1e-2, 3e-2), uses_zoo=False),
        Method("diagonal K32", eigenlora(32, core="diagonal"), (3e-2, 1e-1, 3e-1)),
        Method("INIT r8", init_at_components(), tuned_as="LoRA r8"),
        Method("random INIT r8", init_at_components(random=True), tuned_as="LoRA r8", uses_zoo=False),
        Method("nearest continued", nearest_continued, tuned_as="LoRA r8"),
        Method("nearest, head", nearest_frozen, tuned_as="head"),
        Method("LoraHub", lorahub, tuned_as="head"),
        Method("mixture", mixture(), (3e-2, 1e-1, 3e-1)),
        Method("mixture, shared", mixture(shared=True), (3e-2, 1e-1, 3e-1)),
        Method("random mixture", mixture(random=True), tuned_as="mixture"),
        Method("EigenLoRA K32", eigenlora(32), COEFFICIENT_RATES),
        Method("random K32", eigenlora(32, random=True), COEFFICIENT_RATES, uses_zoo=False),
        Method("full K8", eigenlora(8, core="mixer"), tuned_as="EigenLoRA K8"),
    )
}
