"""Which adapters are nearest to a new task: whose update points downhill on its loss, before any training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.audit.answers import Reuse
from eigenpeft.audit.task.task_gradients import Loss, Tokens, gather_tokens
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, inner_product
from eigenpeft.linalg.scores.nulls import chance_cosine
from eigenpeft.linalg.scores.update_cosines import update_cosines
from eigenpeft.subspace.matching import match_modules


@dataclass(frozen=True)
class Downhill:
    """How far updates point along the negative gradient of a task's loss, as cosines over all modules together.

    Attributes:
        adapters: Adapter to its cosine `⟨-G, ΔW⟩ / (‖G‖ ‖ΔW‖)`, the largest first.
        mean: The same of the mean update of all of them.
        chance: Cosine that the best of as many random updates of their sizes (`matched_null`) exceeds once in 20 draws.
    """

    adapters: dict[str, float]
    mean: float
    chance: float


def downhill(collection: AdapterCollection, *, tokens: Tokens) -> Downhill:
    """The cosine between each adapter's update and the negative gradient, `⟨-G, ΔW⟩ / (‖G‖ ‖ΔW‖)` with `G = ΔᵀX`.

    From `L(W + ε ΔW) = L(W) + ε ⟨G, ΔW⟩ + O(ε²)`: to first order, a small step along ΔW lowers the loss by that much of what a
    step of its length along -G would. Δ is (tokens, out_features), X (tokens, in_features), ΔW (out_features, in_features).

    Args:
        collection: Trained adapters.
        tokens: From `gather_tokens`, of modules of the collection.

    Raises:
        SubspaceError: If the gradient or the updates are zero in all modules.
        CollectionError: If an adapter cannot be read any more, or holds numbers that are not finite.

    Examples:
        >>> import torch
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> module = collection.modules[0]
        >>> update = next(iter(collection.each_factors(module)))  # of "cr"
        >>> gradient_along_it = {module: (-update.lora_B.T.contiguous(), update.lora_A)}
        >>> next(iter(downhill(collection, tokens=gradient_along_it).adapters))
        'cr'
    """
    places, n = {name: place for place, name in enumerate(collection.names)}, len(collection)
    inner, squares, gradients = torch.zeros(3, len(tokens), n + 1, dtype=torch.float64)  # the last is the mean update
    for i, (module, (deltas, inputs)) in enumerate(tokens.items()):
        gradients[i] = frobenius_norm(deltas.mT, inputs) ** 2
        factors: list[tuple[Tensor, Tensor]] = []
        for read in collection.factors(module):
            place, lora_b, lora_a = places[read.adapter], read.lora_B.to(torch.float64), read.lora_A.to(torch.float64)
            inner[i, place] = -inner_product(deltas.mT, inputs, other_B=lora_b, other_A=lora_a)
            squares[i, place] = frobenius_norm(lora_b, lora_a) ** 2
            factors.append((lora_b, lora_a))
        if factors:
            columns, rows = torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors])
            squares[i, n] = frobenius_norm(columns, rows) ** 2 / n**2
    inner[:, n] = inner[:, :n].sum(dim=1) / n
    *found, mean = update_cosines(inner, squares, gradients).tolist()
    cosines = {name: value for name, value in zip(places, found, strict=True) if not math.isnan(value)}
    if not cosines:
        raise SubspaceError("The gradient or every update is zero in all modules; there is nothing to compare.")
    ordered = dict(sorted(cosines.items(), key=lambda item: -item[1]))
    sizes = [math.prod(collection.shapes[module]) for module in tokens]
    tails = [chance_cosine(gradients[:, 0].tolist(), squares[:, places[name]].tolist(), sizes) for name in ordered]
    # Of n independent normal draws, the best exceeds this once in 20; the longest tail of all stands for each.
    chance = NormalDist().inv_cdf(1 - _ONCE_IN / len(tails)) * max(tails)
    return Downhill(ordered, 0.0 if math.isnan(mean) else mean, chance)


def nearest_adapters(
    collection: AdapterCollection, *, model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> Downhill:
    """Which adapters a new task could go on from: those whose update points furthest downhill on its rows.

    They are in the order of `downhill`, the cosine `⟨-G, ΔW⟩ / (‖G‖ ‖ΔW‖)`. One backward pass per batch, no training. The
    model needs the task's head; behind a new one the gradient says nothing until it has been trained a little on the
    base, and one that fits every row leaves a gradient of noise.

    Args:
        collection: Trained adapters of the base.
        model: Base model with the task's head, with or without adapters; it is left as it was.
        batches: As the loss takes them.
        loss: Takes the model and a batch; default: `model(**batch).loss`.

    Returns:
        `Downhill`: its `adapters` are in order, and so `next(iter(found.adapters))` is the nearest, for
        `eigenpeft.tuners.init_lora_from_adapter(model, adapters=collection, name=...)`.

    Raises:
        SubspaceError: If the model has none of the modules, no gradient reaches them, or everything is zero.
        CollectionError: If an adapter cannot be read any more, or holds numbers that are not finite.

    Examples:
        >>> import torch
        >>> from eigenpeft import AdapterCollection
        >>> from peft import LoraConfig, get_peft_model
        >>> for name in ("legal", "sports"):
        ...     config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config).save_pretrained(f"adapters/{name}")
        >>> model, rows = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(16, 8)
        >>> collection = AdapterCollection.from_pretrained("adapters")
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> found = nearest_adapters(collection, model=model, batches=[rows], loss=loss)
        >>> sorted(found.adapters)
        ['legal', 'sports']
    """
    found = match_modules(model, collection.shapes, shapes=collection.shapes).found
    if not found:
        raise SubspaceError(
            f"None of the adapters' {len(collection.modules)} modules, such as {collection.modules[0]!r}, is in the model "
            f"({type(model).__name__}). Pass a model of their base."
        )
    named = dict(model.named_modules())
    targets = {name: named.get(f"{path}.base_layer", named.get(path)) for path, name in found.items()}
    tokens, _ = gather_tokens(model, targets=targets, batches=batches, loss=loss)  # pyright: ignore[reportArgumentType]
    return downhill(collection, tokens=tokens)


_NAMED = 3
_ONCE_IN = 0.05


def reuse_answer(found: Downhill | None) -> Reuse:
    """The third answer: which adapters are nearest to the task.

    Args:
        found: From `downhill`; None where no rows of a task were given.
    """
    if found is None:
        return Reuse(
            answer="not asked",
            text="Not asked: pass a model and rows of the new task, and the nearest adapters are named.",
            nearest=(),
            mean=None,
        )
    nearest = tuple(found.adapters.items())
    named = ", ".join(f"{name} ({cosine:+.3f})" for name, cosine in nearest[:_NAMED])
    chance = f"the best of {len(nearest)} random updates of their sizes is above {found.chance:+.4f} once in 20 draws"
    if nearest[0][1] <= max(found.chance, 0.0):
        return Reuse(
            answer="no",
            text=f"No. None of the adapters is near this task: by the cosine of the update with the negative gradient the first "
            f"are {named}, and {chance}. Train a fresh LoRA, or compare starts with `eigenpeft recycle`.",
            nearest=nearest,
            mean=found.mean,
            chance=found.chance,
        )
    middle, last = median(found.adapters.values()), nearest[-1][1]
    return Reuse(
        answer="yes",
        text=f"Start from {nearest[0][0]} if you continue one adapter. Nearest to this task, by the cosine of the update with the "
        f"negative gradient: {named}; the median of all {len(nearest)} is {middle:+.3f}, the last {last:+.3f}, that of their mean "
        f"update {found.mean:+.3f}, and {chance}.",
        nearest=nearest,
        mean=found.mean,
        chance=found.chance,
    )
