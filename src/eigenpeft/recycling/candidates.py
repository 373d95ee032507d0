"""What `recycle` tries: each candidate's start, its PEFT config and the learning rates tried for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from eigenpeft.building.builder import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.combining import MergedAdapter, merge
from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.subspace import AdapterStore, PrincipalSubspace, random_subspace
from eigenpeft.tuners.controls import same_parameters_lora
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.starts.adapters import init_lora_from_adapter
from eigenpeft.tuners.starts.components import init_lora_from_subspace

LANGUAGE = "CAUSAL_LM"
"""PEFT's task type of language models, which have learning rates of their own."""
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's task types whose models have a new head that is trained with the adapter."""


@dataclass(frozen=True, eq=False)
class Sources:
    """The adapters, and what candidates make of them once.

    Attributes:
        collection: The adapters.
        n_components: K of the subspace.
        scale: λ of the merged start: the mean update times this.
        task_type: PEFT's task type of the new task.
        seed: Seed of random subspaces.
        nearest: Name of the adapter to continue.
    """

    collection: AdapterCollection
    n_components: int
    scale: float
    task_type: str | None
    seed: int
    nearest: str

    @cached_property
    def subspace(self) -> PrincipalSubspace:
        """Subspace fitted to all adapters.

        Raises:
            SubspaceError, CollectionError: As `SubspaceBuilder.fit`.
        """
        return SubspaceBuilder(self.n_components).fit(self.collection).subspace_

    @cached_property
    def store(self) -> AdapterStore:
        """The adapters in bases that hold as much of them as the default of `SubspaceBuilder` does.

        Raises:
            SubspaceError, CollectionError: As `SubspaceBuilder.fit`.
        """
        return AdapterStore.from_collection(SubspaceBuilder().fit(self.collection).subspace_, self.collection)

    @cached_property
    def merged(self) -> MergedAdapter:
        """λ times the mean update; `CollectionError` if the adapters cannot be read or merged.

        Raises:
            EigenPeftError, OSError, ValueError: As `merge`.
        """
        return merge(self.collection, rule="mean", progress=False).scaled(self.scale)

    def lora(self, r: int) -> LoraConfig:
        """A plain LoRA on the modules that the adapters have.

        Args:
            r: Rank; lora_alpha is 2 r.
        """
        modules = list(self.collection.modules)
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=modules, task_type=self.task_type)

    def eigenlora(self, *, random: bool = False) -> EigenLoraConfig:
        """Rank 8 in the adapters' subspace, or in a random one of its size.

        Args:
            random: Whether the subspace is random (the control).

        Raises:
            EigenPeftError: As `SubspaceBuilder.fit` and `EigenLoraConfig`.
        """
        subspace = random_subspace(like=self.subspace, seed=self.seed) if random else self.subspace
        return EigenLoraConfig(subspace=subspace, r=8, lora_alpha=16, task_type=self.task_type)


@dataclass(frozen=True)
class Rates:
    """Learning rates tried for a candidate, the one that was best on other tasks first (docs/regimes.md).

    Attributes:
        classifier: For encoders with a new head (all-MiniLM-L6-v2 there), and for everything that has no row of its own.
        language: For causal language models without one (SmolLM2-135M there).
    """

    classifier: tuple[float, ...]
    language: tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to train the new task.

    Attributes:
        adapt: Makes the trainable model from a fresh base.
        rates: Learning rates tried, the one that was best on other tasks first.
        merged: Whether it starts at the base plus the merged update, which is put into the base's weights.
    """

    adapt: Callable[[PreTrainedModel, Sources], PeftModel]
    rates: Rates
    merged: bool = False


def _plain(r: int) -> Callable[[PreTrainedModel, Sources], PeftModel]:
    return lambda base, sources: get_peft_model(base, sources.lora(r))


def _equal(base: PreTrainedModel, sources: Sources) -> PeftModel:
    config = same_parameters_lora(sources.subspace, r=8)
    config.task_type = sources.task_type
    return get_peft_model(base, config)


def _head(base: PreTrainedModel, sources: Sources) -> PeftModel:
    """The head alone: a LoRA of rank 1 that stays zero, so that the result is a plain LoRA folder like the others."""
    model = get_peft_model(base, sources.lora(1))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterConfigError(
            "this model has no new head, and without one nothing would be trained; only classifiers have this candidate"
        )
    return model


def _eigenlora(*, random: bool = False) -> Callable[[PreTrainedModel, Sources], PeftModel]:
    return lambda base, sources: get_peft_model(base, sources.eigenlora(random=random))


def _init(base: PreTrainedModel, sources: Sources) -> PeftModel:
    """EigenLoRAx-INIT (arXiv 2502.04700, table 2): LoRA r 8 whose A starts at the leading components, B at zero."""
    rank = min(8, *(bank.n_components_in for bank in sources.subspace.banks.values()))
    return init_lora_from_subspace(
        base, subspace=sources.subspace, r=rank, lora_alpha=2 * rank, task_type=sources.task_type
    )


def _nearest(base: PreTrainedModel, sources: Sources) -> PeftModel:
    """A LoRA continued from the nearest adapter, of that one's rank."""
    return init_lora_from_adapter(base, adapters=sources.collection, name=sources.nearest, task_type=sources.task_type)


def _mixture(base: PreTrainedModel, sources: Sources) -> PeftModel:
    """One trained weight per adapter."""
    return get_peft_model(base, EigenLoraConfig(core="mixture", sources=sources.store, task_type=sources.task_type))


LORA = Rates(classifier=(3e-3, 1e-3), language=(1e-2, 3e-3))
COEFFICIENTS = Rates(classifier=(1e-2, 3e-2), language=(1e-1, 3e-2))

CONTROL = "lora_r8"
"""What every other candidate is judged against."""
NEAREST = "nearest_continued"
"""The one that starts at one of the adapters."""

# In the order of what was seen on related adapters (docs/recycle.md): the first ones are tried where the budget is small.
CANDIDATES: dict[str, Candidate] = {
    CONTROL: Candidate(_plain(8), LORA),
    "merged_lora_r8": Candidate(_plain(8), LORA, merged=True),
    "eigenlora": Candidate(_eigenlora(), COEFFICIENTS),
    "merged_eigenlora": Candidate(_eigenlora(), COEFFICIENTS, merged=True),
    "same_parameters": Candidate(_equal, COEFFICIENTS),
    NEAREST: Candidate(_nearest, LORA),
    "mixture": Candidate(_mixture, Rates((3e-2, 3e-1), (3e-2, 3e-1))),
    "init": Candidate(_init, LORA),
    "merged_head": Candidate(_head, Rates((3e-1, 1e-1), (3e-1, 1e-1)), merged=True),
    "lora_r1": Candidate(_plain(1), Rates((3e-3, 1e-2), (1e-2, 3e-2))),
    "random_subspace": Candidate(_eigenlora(random=True), COEFFICIENTS),
}


# On a language model (SmolLM2-135M) coefficients and a continued adapter end behind a LoRA r 8 (docs/recycle.md), though they know
# the form of an answer and are ahead in a short round. So these are tried before them.
_LANGUAGE_FIRST = (CONTROL, "merged_lora_r8", "init")


def default_candidates(task_type: str | None) -> tuple[str, ...]:
    """All candidates, those that did best on other tasks of this type first.

    Args:
        task_type: PEFT's.

    Examples:
        >>> default_candidates("CAUSAL_LM")[:3]
        ('lora_r8', 'merged_lora_r8', 'init')
        >>> default_candidates("SEQ_CLS")[:4]
        ('lora_r8', 'merged_lora_r8', 'eigenlora', 'merged_eigenlora')
    """
    first = _LANGUAGE_FIRST if task_type == LANGUAGE else ()
    return (*first, *(name for name in CANDIDATES if name not in first))


def learning_rates_of(
    candidates: Sequence[str], *, task_type: str | None, given: Mapping[str, Sequence[float]] | None = None
) -> dict[str, tuple[float, ...]]:
    """Candidate to the learning rates tried for it, in order, each once.

    Args:
        candidates: Keys of `CANDIDATES`.
        task_type: PEFT's; language models have rates of their own.
        given: Candidate to rates that replace its own.

    Raises:
        EigenPeftError: If `given` names what is not among `candidates`, or rates that are not positive numbers.

    Examples:
        >>> learning_rates_of(["lora_r8", "eigenlora"], task_type="CAUSAL_LM", given={"lora_r8": [2e-4]})
        {'lora_r8': (0.0002,), 'eigenlora': (0.1, 0.03)}
    """
    own: Mapping[str, Sequence[float]] = {} if given is None else given
    unknown = [name for name in own if name not in candidates]
    if unknown:
        raise EigenPeftError(
            f"learning_rates names {', '.join(unknown)}, which is not tried; the candidates here are {', '.join(candidates)}."
        )
    for name, rates in own.items():
        if not isinstance(rates, Sequence) or not rates or not all(0 < rate < math.inf for rate in rates):
            raise EigenPeftError(
                f"learning_rates[{name!r}]={rates!r} must be positive numbers, at least one, in a list or tuple."
            )
    kind = "language" if task_type == LANGUAGE else "classifier"
    every = {name: own[name] if name in own else getattr(CANDIDATES[name].rates, kind) for name in candidates}
    return {name: tuple(dict.fromkeys(rates)) for name, rates in every.items()}
