"""The controls of an EigenLoRA run as configs: the same run in everything but what the control takes away."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError, SubspaceError
from eigenpeft.subspace import PrincipalSubspace, mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.subspace.cores import core_kind
from eigenpeft.tuners.eigenlora.bases import find_bases
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig

Control = Literal["random", "shuffled", "mean_only", "same_parameters", "lora"]
CONTROLS: tuple[Control, ...] = get_args(Control)
# What a plain LoRA takes over from the config: all that is not about places, ranks or subspaces.
_SHARED = ("task_type", "use_rslora", "lora_dropout", "bias", "modules_to_save", "base_model_name_or_path", "revision")


def control_config(
    config: EigenLoraConfig, *, control: Control, collection: AdapterCollection | None = None, seed: int = 0
) -> EigenLoraConfig | LoraConfig:
    """What to train beside an EigenLoRA before believing in it.

    Args:
        config: Configuration of the run that is to be controlled.
        control: "random": random bases of the same sizes. "shuffled": every module gets the bases of another one of its
            shape. "mean_only": the directions of the adapters' mean update. "same_parameters": a plain LoRA with at most
            as many parameters, on the last modules. "lora": a plain LoRA of the same rank, on the same modules.
        collection: What the subspace was built from, for "mean_only".
        seed: Seed of the controls "random" and "shuffled".

    Returns:
        A config for `get_peft_model`; each control needs a learning rate of its own.

    Raises:
        AdapterConfigError: If the control is unknown or the subspace is not at hand; `target_modules` names none of its
            modules; "mean_only" is asked for without a collection or with several K; a plain LoRA should start from an adapter,
            or "same_parameters" has a `rank_pattern`; or of a mixture, for all but "lora".
        SubspaceError: If the subspace has no such control, or is nowhere; the message says why.
        ArtifactError: If the subspace, or the store of the config's sources, is damaged.
        CollectionError: If an adapter of the collection cannot be read.

    Examples:
        >>> import torch
        >>> from eigenpeft import EigenLoraConfig, PrincipalSubspace
        >>> from eigenpeft.subspace import ModuleSubspace
        >>> ones = torch.ones(4)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 4}
        >>> bank = ModuleSubspace(torch.eye(4, 8), torch.eye(4, 8), **spectra)
        >>> config = EigenLoraConfig(subspace=PrincipalSubspace({"q": bank, "v": bank}), r=2)
        >>> control_config(config, control="same_parameters").r  # 16 coefficients per module pay for rank 1
        1
    """
    if control not in CONTROLS:
        raise AdapterConfigError(f"control={control!r} must be one of {', '.join(map(repr, CONTROLS))}.")
    if core_kind(config.core).weighs_sources and control != "lora":
        raise AdapterConfigError(
            f"control={control!r} is of a subspace, and core={config.core!r} weighs the adapters in it; compare with "
            "control='lora', with the mean alone (init_weights, untrained), or with the nearest adapter "
            "(eigenpeft.audit.nearest_adapters)."
        )
    subspace = _used(config)
    if control in ("same_parameters", "lora"):
        return _plain_lora(config, control, subspace)
    if control == "random":
        other = random_subspace(like=subspace, seed=seed)
    elif control == "shuffled":
        other = shuffled_subspace(subspace, seed=seed)
    else:
        other = _mean_only(subspace, collection)
    return replace(config, subspace=other, subspace_sha256=None, subspace_revision=None, n_components=None)


def _used(config: EigenLoraConfig) -> PrincipalSubspace:
    """The modules and components of the subspace that the config trains on."""
    subspace = find_bases(**config.named_bases).subspace
    if subspace is None:
        raise AdapterConfigError(
            f"This adapter's file embeds the components of {len(config.embedded_n_components or ())} modules, and a control is "
            f"made from the subspace they came from, which is not in memory (subspace={config.subspace!r}). Pass "
            "EigenLoraConfig(subspace=...) with that PrincipalSubspace itself."
        )
    if config.target_modules not in (None, "all-linear"):
        kept = {name: bank for name, bank in subspace.items() if check_target_module_exists(config, name)}
        if not kept:
            raise AdapterConfigError(
                f"target_modules={config.target_modules!r} names none of the subspace's {len(subspace)} modules, such as "
                f"{next(iter(subspace))!r}."
            )
        subspace = PrincipalSubspace(kept, info=subspace.info)
    return subspace if config.n_components is None else subspace.truncate(config.n_components)


def _mean_only(subspace: PrincipalSubspace, collection: AdapterCollection | None) -> PrincipalSubspace:
    sizes = sorted({bank.n_components for bank in subspace.values()})
    if collection is None or len(sizes) > 1:
        raise AdapterConfigError(
            f"control='mean_only' needs the adapters that the subspace was built from (collection=; --adapters of a command) "
            f"and one number of components for all modules; got {collection!r} and K = {', '.join(map(str, sizes))}."
        )
    return mean_only_subspace(collection, n_components=sizes[0], progress=False)


def _plain_lora(config: EigenLoraConfig, control: str, subspace: PrincipalSubspace) -> LoraConfig:
    if config.init_from is not None:
        raise AdapterConfigError(
            f"control={control!r} is a LoRA that starts at zero, but init_from={config.init_from!r}; compare a warm start "
            "with that adapter trained further (PeftModel.from_pretrained(..., is_trainable=True))."
        )
    shared: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    if control == "lora":
        ranks = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
        return LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(subspace), **ranks, **shared)
    if config.rank_pattern:
        raise AdapterConfigError(
            f"control='same_parameters' counts 2 K r coefficients per module with one r for all, but "
            f"rank_pattern={config.rank_pattern!r}; leave it out or use control='lora'."
        )
    small = same_parameters_lora(subspace, r=config.r, core=config.core)
    return LoraConfig(r=small.r, lora_alpha=small.lora_alpha, target_modules=small.target_modules, **shared)


def same_parameters_lora(
    subspace: PrincipalSubspace,
    *,
    r: int,
    core: str = "low_rank",
    lora_alpha: int | None = None,
    place: Literal["last", "spread"] = "last",
) -> LoraConfig:
    """A plain LoRA with at most as many trainable parameters as an EigenLoRA on `subspace`, and as near as it gets.

    Both are counted: `r_LoRA Σ (in_features + out_features)` over the LoRA's modules is at most the sum over the
    subspace's modules of what the core has. A LoRA of rank 1 often has more parameters on one weight than an EigenLoRA;
    it is then put on as many modules as the budget pays for.

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
        SubspaceError: If the core or the place is unknown, r is less than 1, or not even one module of rank 1 fits.

    Examples:
        >>> import torch
        >>> from eigenpeft import PrincipalSubspace
        >>> from eigenpeft.subspace import ModuleSubspace
        >>> ones = torch.ones(4)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 4}
        >>> bank = ModuleSubspace(torch.eye(4, 8), torch.eye(4, 8), **spectra)
        >>> config = same_parameters_lora(PrincipalSubspace({"q": bank, "v": bank}), r=2)  # 2 x 16 parameters
        >>> config.r, sorted(config.target_modules)
        (1, ['q', 'v'])
    """
    kind = core_kind(core)
    if place not in ("last", "spread"):
        raise SubspaceError(f"place={place!r} must be 'last' or 'spread'.")
    if r < 1:
        raise SubspaceError(f"r={r} must be at least 1.")
    budget = sum(
        kind.n_parameters(n_components_in=len(each.components_in), n_components_out=len(each.components_out), rank=r)
        for each in subspace.values()
    )
    cost = {name: bank.in_features + bank.out_features for name, bank in subspace.items()}
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
