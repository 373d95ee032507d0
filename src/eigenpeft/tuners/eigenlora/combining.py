"""Weighted combination of EigenLoRA adapters in coefficient space."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.factored import truncate
from eigenpeft.linalg.merging import RULES, find_rule, merge_cores, norm_scale, weighted
from eigenpeft.subspace.cores import core_kind
from eigenpeft.subspace.seeding import seeded_generator
from eigenpeft.tuners.eigenlora.bases import adapted_layers
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of

_LINEAR_ALGEBRA = ("linear", "cat", "svd")
# PEFT's own functions of (tensors, weights, density), for cores whose coefficients are one tensor.
_ENTRYWISE: dict[str, Any] = {
    "ties": ties,
    "dare_ties": dare_ties,
    "dare_linear": dare_linear,
    "magnitude_prune": magnitude_prune,
}
# Rules on cores that keep a diagonal core diagonal.
_DIAGONAL_RULES = ("task_arithmetic", "mean", "dare")


def is_core_rule(combination: str) -> bool:
    """Whether a word names a rule of `eigenpeft.linalg.merging` on cores, and is none of PEFT's.

    Args:
        combination: As a user passes it.
    """
    rule = RULES.get(combination)
    return (
        combination not in _ENTRYWISE and rule is not None and not rule.model_inputs and "statistics" not in rule.needs
    )


def check_core_rule(model: nn.Module, *, configs: Sequence[Any], adapters: Sequence[str], combination: str) -> None:
    """Refuse a rule on cores where adapters have no cores on common axes.

    Args:
        model: Adapted model.
        configs: Configurations of the adapters.
        adapters: Their names.
        combination: Name of the rule.

    Raises:
        AdapterConfigError: If they differ in core or subspace, or a layer has several cores.
    """
    if any(config.lora_bias for config in configs):
        raise AdapterConfigError(
            f"combination_type={combination!r}: no rule merges the biases of lora_bias=True; combine with 'linear' or 'cat'."
        )
    known = can_combine(model, configs=configs, adapters=adapters, combination="svd")
    several = [
        module
        for name in adapters
        for module, layer, _ in (adapted_layers(model, name) if known else ())
        if not kind_of(layer).has_one_core
    ]
    is_diagonal = known and not core_kind(configs[0].core).is_matrix
    if not known or several or (is_diagonal and combination not in _DIAGONAL_RULES):
        why = (
            f"{several[0]!r} has no single core"
            if several
            else f"the result of this rule on diagonal cores is not diagonal (only that of {', '.join(_DIAGONAL_RULES)} is)"
            if known
            else "these differ in core or subspace, hold an offset beside their cores, or are not all EigenLoRA"
        )
        raise AdapterConfigError(
            f"combination_type={combination!r} works on cores of one kind in one subspace; {why}. Merge them as plain LoRA with "
            "eigenpeft.merge(model, rule=...)."
        )


def can_combine(model: nn.Module, *, configs: Sequence[Any], adapters: Sequence[str], combination: str) -> bool:
    """Whether adapters can be combined in coefficient space: one core, the same bases in every layer.

    Linear algebra is exact there. What works entry by entry is taken on the one coefficient tensor of the cores "full" and
    "diagonal": on LoRA's two factors, of which A is the same for all of them, opposite weights would cancel it.

    Args:
        model: Adapted model.
        configs: Configurations of the adapters.
        adapters: Their names.
        combination: PEFT's word.
    """
    if not all(isinstance(config, EigenLoraConfig) for config in configs):
        return False
    is_factored = core_kind(configs[0].core).is_factored
    if combination not in _LINEAR_ALGEBRA and (combination not in _ENTRYWISE or is_factored):
        return False
    if len({config.core for config in configs}) > 1 or any(
        config.use_dora or config.offset_ranks for config in configs
    ):
        return False
    if len({(config.subspace_sha256, config.n_components) for config in configs}) > 1:
        return False
    if not is_factored:
        return True
    layers = [layer for name in adapters for _, layer, _ in adapted_layers(model, name)]
    # The channels of a grouped convolution's B are bound to the groups; ranks that differ within one layer do not add.
    kinds = [(layer, kind_of(layer)) for layer in layers]
    grouped = any(kind.rank_is_split and kind.n_blocks(layer) > 1 for layer, kind in kinds)
    ranks = [{layer.r[name] for name in adapters if name in layer.r} for layer in layers]
    return not grouped and (combination != "linear" or all(len(each) == 1 for each in ranks))


def with_offsets(
    model: nn.Module, *, configs: Sequence[Any], adapters: Sequence[str], combination: str, rank: int | None
) -> tuple[str, int | None]:
    """PEFT's word and rank for a sum that is to contain the offsets of its sources, whose ranks PEFT does not know.

    Args:
        model: Adapted model.
        configs: Configurations of the adapters.
        adapters: Their names.
        combination: PEFT's word.
        rank: PEFT's `svd_rank`.

    Returns:
        Word and rank: "svd" at the sum of all ranks, which is exact, for "cat".

    Raises:
        AdapterConfigError: If the combination works on factors of one rank.
    """
    having = [name for name, config in zip(adapters, configs, strict=True) if getattr(config, "offset_ranks", None)]
    if not having or combination.endswith("svd"):
        return combination, rank
    if combination != "cat":
        raise AdapterConfigError(
            f"combination_type={combination!r} works on factors of one rank, and {having[0]!r} has an offset beside its own; "
            f"use 'cat', 'svd' or {combination + '_svd'!r}."
        )
    rows: dict[str, int] = {}
    for name in adapters:
        for path, layer, _ in adapted_layers(model, name):
            rows[path] = rows.get(path, 0) + len(factor_dicts(layer)[0][name].weight)
    return "svd", max(rows.values())


@torch.no_grad()
def combine(
    model: nn.Module,
    *,
    adapters: Sequence[str],
    weights: Sequence[float],
    new: str,
    combination: str,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> None:
    """Fill the coefficients of a new adapter, whose scaling is 1.

    Args:
        model: Adapted model that has the new adapter already.
        adapters: Sources.
        weights: One per source.
        new: Name of the new adapter.
        combination: "linear" (PEFT's: both factors are summed with the root of the weight), "cat" (exact, the ranks add
            up), "svd" (the nearest of the new adapter's rank), or PEFT's words for what works entry by entry.
        density: Share of the entries to keep, for what works entry by entry.
        majority_sign_method: PEFT's own, for "ties" and "dare_ties".

    Raises:
        AdapterConfigError: If a density is needed and missing.
    """
    if combination in _ENTRYWISE and density is None:
        raise AdapterConfigError(f"combination_type={combination!r} needs density=, the share of the entries to keep.")
    signs = {"majority_sign_method": majority_sign_method} if combination.endswith("ties") else {}
    for _, layer, _ in adapted_layers(model, new):
        parts = [
            (weight * layer.scaling[name], *_coefficients(layer, name))
            for name, weight in zip(adapters, weights, strict=True)
            if name in factor_dicts(layer)[0]
        ]
        target_in, target_out = _coefficients(layer, new)
        if target_in is None:
            factors = target_out.new_tensor([weight for weight, _, _ in parts])
            tensors = [part_out.detach() for _, _, part_out in parts]
            merge = _ENTRYWISE.get(combination)
            target_out.copy_(merge(tensors, factors, density, **signs) if merge else task_arithmetic(tensors, factors))
            continue
        part_in, part_out = _combined(parts, combination, rank=len(target_in))
        target_in.zero_()[: len(part_in)] = part_in
        target_out.zero_()[:, : len(part_in)] = part_out


@torch.no_grad()
def combine_cores(
    model: nn.Module,
    *,
    adapters: Sequence[str],
    weights: Sequence[float],
    new: str,
    core: str,
    combination: str,
    scale: float | str | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Fill the coefficients of a new adapter, whose scaling is 1, with the sources' cores merged by a published rule.

    Args:
        model: Adapted model that has the new adapter already.
        adapters: Sources, of one core on the same bases.
        weights: One per source.
        new: Name of the new adapter.
        core: Kind of their cores.
        combination: Name in `eigenpeft.linalg.merging.RULES`.
        scale: Final multiplier; "auto" and None as for `eigenpeft.merge`.
        seed: Seed of DARE's draws.
        **options: Options of the rule.

    Raises:
        AdapterConfigError: If an option is unknown or out of range.
        ValueError, SubspaceError: If no rule has the name, or it cannot combine such cores; `check_core_rule` says so before.
    """
    rule = find_rule(combination)
    scale = rule.scale if scale is None else scale
    kind = core_kind(core)
    for module, layer, _ in adapted_layers(model, new):
        present = [name for name in adapters if name in factor_dicts(layer)[0]]
        cores = torch.stack(
            [layer.scaling[name] * kind.to_dense(_parts(layer, name)).detach().double() for name in present]
        )
        own = [weight for name, weight in zip(adapters, weights, strict=True) if name in present]
        seeds = [seeded_generator(seed, module, f"dare {name}").initial_seed() for name in present]
        extra: dict[str, Any] = {"seeds": seeds} if "seeds" in rule.needs else {}
        try:
            merged = merge_cores(cores, rule=combination, weights=own, **options, **extra)
        except ValueError as error:
            raise AdapterConfigError(f"combination_type={combination!r}: {error}") from error
        merged = merged * (norm_scale(merged, cores=weighted(cores, own)) if isinstance(scale, str) else scale)
        target_in, target_out = _coefficients(layer, new)
        rank = None if target_in is None else len(target_in)
        parts = kind.from_factors(merged, torch.eye(merged.shape[1], dtype=merged.dtype), rank=rank)
        target_out.copy_(parts["coefficients_out"])
        if target_in is not None:
            target_in.copy_(parts["coefficients_in"])


def _parts(layer: LoraLayer, adapter_name: str) -> dict[str, Tensor]:
    part_in, part_out = _coefficients(layer, adapter_name)
    return {"coefficients_out": part_out} | ({} if part_in is None else {"coefficients_in": part_in})


def _combined(parts: Sequence[Any], combination: str, *, rank: int) -> tuple[Tensor, Tensor]:
    if combination == "linear":
        roots = [math.sqrt(abs(weight)) for weight, _, _ in parts]
        part_in = [math.copysign(root, part[0]) * part[1] for root, part in zip(roots, parts, strict=True)]
        part_out = [root * part[2] for root, part in zip(roots, parts, strict=True)]
        return torch.stack(part_in).sum(dim=0), torch.stack(part_out).sum(dim=0)
    part_in = torch.cat([weight * part_in for weight, part_in, _ in parts])
    part_out = torch.cat([part_out for _, _, part_out in parts], dim=1)
    if combination == "svd":
        part_out, part_in = truncate(part_out.float(), part_in.float(), rank=min(rank, len(part_in)))
    return part_in, part_out


def _coefficients(layer: LoraLayer, adapter_name: str) -> tuple[Tensor | None, Tensor]:
    inputs, outputs = factor_dicts(layer)
    return inputs[adapter_name].coefficients, outputs[adapter_name].coefficients
