"""Controls that are adapters rather than subspaces: the nearest source adapter, a plain LoRA of as many parameters."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, inner_product
from eigenpeft.subspace.cores import core_kind
from eigenpeft.subspace.principal import PrincipalSubspace


def nearest_adapter(collection: AdapterCollection, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, float]:
    """The source adapter most like a given one: what copying would do without any subspace.

    Args:
        collection: Where to look.
        factors: `(lora_B (out_features, r), lora_A (r, in_features))` by module, scaling folded into lora_B.

    Returns:
        Name and cosine between the ΔW of all common modules taken together. Modules that a source adapter does not
        have count as zero there.

    Raises:
        SubspaceError: If there is no common module, or the given update is zero.
    """
    common = [module for module in collection.modules if module in factors]
    own = sum(float(frobenius_norm(*factors[module])) ** 2 for module in common)
    if not own > 0:
        raise SubspaceError(
            f"The given adapter has no update in any module of the collection ({len(common)} of its {len(factors)} "
            "modules are known there); compare adapters of the same base model that are trained."
        )
    inner, squares = dict.fromkeys(collection.names, 0.0), dict.fromkeys(collection.names, 0.0)
    for module in common:
        for read in collection.factors(module):
            inner[read.adapter] += float(inner_product(read.lora_B, read.lora_A, *factors[module]))
            squares[read.adapter] += float(frobenius_norm(read.lora_B, read.lora_A)) ** 2
    cosines = {name: inner[name] / (own * square) ** 0.5 for name, square in squares.items() if square > 0}
    if not cosines:
        raise SubspaceError(
            f"All {len(collection)} adapters of the collection are zero in the {len(common)} common modules, so none of them is "
            "the nearest; pass a collection that has trained adapters."
        )
    name = max(cosines, key=lambda each: cosines[each])
    return name, cosines[name]


def same_parameters_lora(
    subspace: PrincipalSubspace,
    *,
    r: int,
    core: str = "low_rank",
    lora_alpha: int | None = None,
    place: Literal["last", "spread"] = "last",
) -> LoraConfig:
    """A plain LoRA with at most as many trainable parameters as an EigenLoRA on `subspace`, and as near as it gets.

    A LoRA of rank 1 often has more parameters on one weight than an EigenLoRA; it is then put on as many modules as the
    budget pays for.

    Args:
        subspace: Gives modules, widths and K.
        r: The EigenLoRA's rank.
        core: The EigenLoRA's core: "low_rank" (2 K r per module), "full" (K²) or "diagonal" (K).
        lora_alpha: `lora_alpha` of the LoRA; default: twice its rank.
        place: Which modules, where not all can be paid for: the "last" of the network, by the numbers in their names
            (the better control: docs/study.md), or "spread" evenly.

    Returns:
        PEFT's `LoraConfig` with `r` and `target_modules` set; add task_type and modules_to_save to it.

    Raises:
        SubspaceError: If the core is unknown, r is less than 1, or not even one module of rank 1 fits.

    Examples:
        >>> import torch
        >>> from eigenpeft import PrincipalSubspace
        >>> from eigenpeft.subspace import ModuleSubspace
        >>> bases = ModuleSubspace(torch.eye(4, 8), torch.eye(4, 8), torch.ones(4), torch.ones(4), torch.ones(4) / 4)
        >>> config = same_parameters_lora(PrincipalSubspace({"q": bases, "v": bases}), r=2)  # 2 x 16 parameters
        >>> config.r, sorted(config.target_modules)
        (1, ['q', 'v'])
    """
    kind = core_kind(core)
    if place not in ("last", "spread"):
        raise SubspaceError(f"place={place!r} must be 'last' or 'spread'.")
    if r < 1:
        raise SubspaceError(f"r={r} must be at least 1.")
    budget = sum(kind.n_parameters(len(each.components_in), len(each.components_out), r) for each in subspace.values())
    cost = {name: bases.in_features + bases.out_features for name, bases in subspace.items()}
    rank = budget // sum(cost.values())
    names = list(cost)
    if rank == 0:
        rank, names = 1, _affordable({name: cost[name] for name in sorted(cost, key=_by_number)}, budget, place)
    return LoraConfig(r=rank, lora_alpha=lora_alpha or 2 * rank, target_modules=names)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _affordable(cost: Mapping[str, int], budget: int, place: str) -> list[str]:
    names = list(cost)
    for count in range(len(names), 0, -1):
        spread = torch.linspace(0, len(names) - 1, count).round().int().tolist() if count > 1 else [len(names) - 1]
        chosen = names[-count:] if place == "last" else [names[i] for i in spread]
        if sum(cost[name] for name in chosen) <= budget:
            return chosen
    raise SubspaceError(
        f"A budget of {budget} parameters does not pay for a LoRA of rank 1 on a single module, which has "
        f"{min(cost.values())}; compare with a larger r or K."
    )
