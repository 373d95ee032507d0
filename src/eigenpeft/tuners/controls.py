"""The controls of an EigenLoRA run as configs: the same run in everything but what the control takes away."""

from dataclasses import replace
from typing import Any, Literal, get_args

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from eigenpeft.audit.controls import same_parameters_lora
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import PrincipalSubspace, mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.subspace.cores import core_kind
from eigenpeft.tuners.eigenlora.bases import subspace_of
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig

Control = Literal["random", "shuffled", "mean_only", "same_parameters", "lora"]
CONTROLS: tuple[Control, ...] = get_args(Control)
# What a plain LoRA takes over from the config: all that is not about places, ranks or subspaces.
_SHARED = ("task_type", "use_rslora", "lora_dropout", "bias", "modules_to_save", "base_model_name_or_path", "revision")


def control_config(
    config: EigenLoraConfig, control: Control, *, adapters: AdapterCollection | None = None, seed: int = 0
) -> EigenLoraConfig | LoraConfig:
    """What to train beside an EigenLoRA before believing in it.

    Args:
        config: Configuration of the run that is to be controlled.
        control: "random": random bases of the same sizes. "shuffled": every module gets the bases of another one of its
            shape. "mean_only": the directions of the adapters' mean update. "same_parameters": a plain LoRA with at most
            as many parameters, on the last modules. "lora": a plain LoRA of the same rank, on the same modules.
        adapters: What the subspace was built from, for "mean_only".
        seed: Seed of the controls "random" and "shuffled".

    Returns:
        A config for `get_peft_model`; each control needs a learning rate of its own.

    Raises:
        AdapterConfigError: If the control is unknown, "mean_only" is asked for without adapters or with several K, or a
            plain LoRA should start from an adapter; or of a mixture, for all but "lora".
        SubspaceError: If the subspace has no such control; the message says why.

    Examples:
        >>> import torch
        >>> from eigenpeft import EigenLoraConfig, PrincipalSubspace
        >>> from eigenpeft.subspace import ModuleSubspace
        >>> bases = ModuleSubspace(torch.eye(4, 8), torch.eye(4, 8), torch.ones(4), torch.ones(4), torch.ones(4) / 4)
        >>> config = EigenLoraConfig(subspace=PrincipalSubspace({"q": bases, "v": bases}), r=2)
        >>> control_config(config, "same_parameters").r  # 16 coefficients per module pay for rank 1
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
        bases = random_subspace(like=subspace, seed=seed)
    elif control == "shuffled":
        bases = shuffled_subspace(subspace, seed=seed)
    else:
        bases = _mean_only(subspace, adapters)
    return replace(config, subspace=bases, subspace_sha256=None, subspace_revision=None, n_components=None)


def _used(config: EigenLoraConfig) -> PrincipalSubspace:
    """The modules and components of the subspace that the config trains on."""
    subspace = subspace_of(config)
    if subspace is None:
        raise AdapterConfigError(
            "This adapter embeds its components, and a control is made from the subspace they came from; pass "
            "EigenLoraConfig(subspace=...)."
        )
    if config.target_modules not in (None, "all-linear"):
        kept = {name: bases for name, bases in subspace.items() if check_target_module_exists(config, name)}
        if not kept:
            raise AdapterConfigError(
                f"target_modules={config.target_modules!r} names none of the subspace's {len(subspace)} modules, such as "
                f"{next(iter(subspace))!r}."
            )
        subspace = PrincipalSubspace(kept, info=subspace.info)
    return subspace if config.n_components is None else subspace.truncate(config.n_components)


def _mean_only(subspace: PrincipalSubspace, adapters: AdapterCollection | None) -> PrincipalSubspace:
    sizes = sorted({bases.n_components for bases in subspace.values()})
    if adapters is None or len(sizes) > 1:
        raise AdapterConfigError(
            f"control='mean_only' needs adapters=, the collection that the subspace was built from, and one number of "
            f"components for all modules; got adapters={adapters!r} and K = {', '.join(map(str, sizes))}."
        )
    return mean_only_subspace(adapters, n_components=sizes[0], progress=False)


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
