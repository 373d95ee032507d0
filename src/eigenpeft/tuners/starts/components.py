"""EigenLoRAx-INIT: a plain LoRA that starts at the principal components, in which everything is trained."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.subspace import PrincipalSubspace
from eigenpeft.tuners.starts.config import StartedLoraConfig, check_rank


def _at_in(components_out: Tensor, components_in: Tensor, rank: int) -> Factors:
    return components_out.new_zeros(components_out.shape[1], rank), components_in[:rank]


def _at_out(components_out: Tensor, components_in: Tensor, rank: int) -> Factors:
    return components_out[:rank].mT, components_in.new_zeros(rank, components_in.shape[1])


def _at_both(components_out: Tensor, components_in: Tensor, rank: int) -> Factors:
    half = rank // 2
    columns, rows = (side.new_zeros(rank, side.shape[1]) for side in (components_out, components_in))
    rows[:half], columns[half : 2 * half] = components_in[:half], components_out[:half]
    return columns.mT, rows


SIDES: dict[str, Callable[[Tensor, Tensor, int], Factors]] = {"in": _at_in, "out": _at_out, "both": _at_both}
"""Start `(B, A)` by side; `B A = 0` in each, and a gradient reaches every row of A or its column of B."""


def init_lora_from_subspace(
    model: nn.Module,
    *,
    subspace: PrincipalSubspace,
    side: str = "in",
    r: int = 8,
    adapter_name: str = "default",
    **lora: Any,
) -> PeftModel:
    """A plain LoRA that starts at the leading principal components (EigenLoRAx-INIT, arXiv 2502.04700, table 2).

    Everything is trained, and what is saved needs no eigenpeft. For a trainer that makes the adapter itself, see
    `lora_config_from_subspace`.

    Args:
        model: Base model.
        subspace: Subspace of adapters of that base.
        side: "in": A is the leading r components of the input side and B is zero, as in the paper; "out": B is those of the
            output side and A is zero; "both": half of the rank starts as "in" and half as "out". ΔW = 0 in each.
        r: Rank, at most the number of components.
        adapter_name: Name of the adapter.
        **lora: Further fields of `peft.LoraConfig`; `target_modules` defaults to the subspace's modules, `lora_alpha` to 2 r.

    Returns:
        The adapted model.

    Raises:
        AdapterConfigError: If r is less than 1, a module has fewer components, the side is unknown or takes an even r, or the
            model has none of the modules.
        TypeError: If `peft.LoraConfig` has no field of a name in `**lora`.
        ValueError: What `peft.LoraConfig` and `get_peft_model` raise, such as for `target_modules` that the model lacks.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = init_lora_from_subspace(base, subspace=PrincipalSubspace({"0": bank}), r=2)
        >>> model.base_model.model[0].lora_A["default"].weight.data
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]])
    """
    config = lora_config_from_subspace(subspace, side=side, r=r, **lora)
    adapted = get_peft_model(model, config, adapter_name=adapter_name)  # pyright: ignore[reportArgumentType]
    assert isinstance(adapted, PeftModel)
    return adapted


def lora_config_from_subspace(
    subspace: PrincipalSubspace, *, side: str = "in", r: int = 8, **lora: Any
) -> StartedLoraConfig:
    """A `peft.LoraConfig` whose adapter starts at the leading components, for `get_peft_model` and trainers alike.

    Args:
        subspace: Subspace of adapters of the base model.
        side: As for `init_lora_from_subspace`.
        r: As for `init_lora_from_subspace`.
        **lora: As for `init_lora_from_subspace`.

    Raises:
        AdapterConfigError: If r is less than 1, a module has fewer components, or the side is unknown or takes an even r.
        TypeError: If `peft.LoraConfig` has no field of a name in `**lora`.
        ValueError: What `peft.LoraConfig` raises for fields that do not go together.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> config = lora_config_from_subspace(PrincipalSubspace({"0": bank}), r=2)
        >>> config.peft_type.value, config.lora_alpha
        ('LORA', 4)
    """
    if side not in SIDES:
        raise AdapterConfigError(f"side={side!r} must be one of {', '.join(map(repr, SIDES))}.")
    check_rank(r)
    if side == "both" and r % 2:
        raise AdapterConfigError(
            f"side='both' starts half of the rank on each side, and r={r} is odd; choose an even r."
        )
    needed = r // 2 if side == "both" else r
    for name, bank in subspace.items():
        counts = {"in": bank.n_components_in, "out": bank.n_components_out}
        fewest = min(count for own, count in counts.items() if side in (own, "both"))
        if fewest < needed:
            raise AdapterConfigError(
                f"r={r} with side={side!r} needs {needed} components, and {name!r} has {fewest}; choose a smaller r or a larger "
                "subspace."
            )
    config = StartedLoraConfig(
        r=r, **{"lora_alpha": 2 * r, "fan_in_fan_out": bool(subspace.info.fan_in_fan_out)} | lora
    )
    config.start = {name: SIDES[side](bank.components_out, bank.components_in, r) for name, bank in subspace.items()}
    return config
