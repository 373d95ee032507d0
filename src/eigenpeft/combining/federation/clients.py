"""The client's side of a round: what a PEFT model sends, and how it takes what the server averaged."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from eigenpeft.combining.federation.averaging import RESIDUE, sent_keys
from eigenpeft.combining.federation.seeds import SEEDS, rebuild
from eigenpeft.combining.federation.updates import ClientUpdate, factor_keys, fit_rank
from eigenpeft.errors import AdapterConfigError

_KINDS = ("LORA", "EIGENLORA")
_ORIGINAL = "_eigenpeft_weight_before_rounds"


def round_update(
    model: Any,
    *,
    name: str,
    n_rows: float = 1.0,
    rule: str = "exact",
    base: str | None = None,
    steps: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> ClientUpdate:
    """What a client sends of its trained adapter.

    Args:
        model: A `PeftModel`.
        name: Name of the client in messages.
        n_rows: Rows it trained on.
        rule: The server's rule, which decides what travels.
        base: What it was trained on; None takes the fingerprint of an EigenLoRA adapter's subspace, or the base model's name.
        steps: Needed with `rule="seeds"` alone: what `train_steps` returned on this client. Before the first round the server
            passes `no_steps(model)`.
        adapter_name: Which adapter.

    Raises:
        AdapterConfigError: If the rule is unknown or lacks its steps, the adapter is of another kind, or its modules have
            different scalings.
        KeyError: If the model has no such adapter.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> client = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> update = round_update(client, name="hospital-1", n_rows=120)
        >>> update.n_rows, sorted(tuple(tensor.shape) for tensor in update.tensors.values())
        (120.0, [(2, 4), (3, 2)])
    """
    config = _config_of(model, adapter_name)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _KINDS or getattr(config, "use_dora", False):
        raise AdapterConfigError(
            f"The adapter {adapter_name!r} is of peft_type {kind}{' with DoRA' if kind in _KINDS else ''}, whose update is no "
            f"product of two factors or one core; rounds average {' and '.join(_KINDS)} adapters without DoRA."
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    sent = {key: tensors[key].detach().cpu().clone() for key in sent_keys(tensors, rule=rule)}
    if (rule == "seeds") != (steps is not None):
        raise AdapterConfigError(
            f"rule={rule!r} and steps={'None' if steps is None else 'given'}: steps of train_steps go with rule='seeds', and only "
            "with it."
        )
    sent |= steps or {}
    own = base or getattr(config, "subspace_sha256", None) or config.base_model_name_or_path
    return ClientUpdate(
        name, sent, n_rows=float(n_rows), scaling=scaling_of(model, adapter_name=adapter_name), base=own
    )


def load_round(
    model: Any, *, tensors: Mapping[str, Tensor], scaling: float | None = None, adapter_name: str = "default"
) -> None:
    """Give a client's adapter what the server averaged; what does not travel stays as it is.

    Args:
        model: A `PeftModel`; its adapter may have another rank or scaling than the server's.
        tensors: `Averaged.tensors`, or what the first round starts from: by PEFT's keys, in the server's shapes.
        scaling: Scaling of the server's adapter; None if it is the client's own.
        adapter_name: Which adapter.

    Raises:
        AdapterConfigError: If a tensor has no place in the adapter or a shape that does not fit it (A and B may have another
            rank), or the adapter's modules have different scalings. The model is then as it was.
        KeyError: If the model has no such adapter.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> client = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> averaged = {key: torch.ones_like(tensor) for key, tensor in round_update(client, name="hospital-1").tensors.items()}
        >>> load_round(client, tensors=averaged)
        >>> client.base_model.model[0].lora_A["default"].weight[0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    _config_of(model, adapter_name)
    if SEEDS in tensors:
        rebuild(model, tensors)
        return
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    residuals = {key: tensor for key, tensor in tensors.items() if f".{RESIDUE}_" in key}
    averaged = {key: tensor for key, tensor in tensors.items() if key not in residuals}
    pairs = factor_keys(averaged)
    unknown = [key for key in averaged if key not in own] + [key for key in residuals if _module_of(key) not in pairs]
    if unknown:
        raise AdapterConfigError(
            f"{len(unknown)} of the {len(tensors)} averaged tensors, such as {unknown[0]!r}, have no place in the adapter "
            f"{adapter_name!r}. Give every client the same target modules, core and head."
        )
    _check_shapes(averaged, own, adapter_name)
    further = {module: _residual_of(model, module, residuals) for module in dict.fromkeys(map(_module_of, residuals))}
    mine = scaling_of(model, adapter_name=adapter_name)
    for sides in pairs.values():
        rank = len(own[sides["A"]]) if "A" in sides else 0
        part = {key: averaged[key] for key in sides.values()}
        averaged |= fit_rank(part, rank=rank, scaling=mine if scaling is None else scaling, own_scaling=mine)
    set_peft_model_state_dict(model, own | averaged, adapter_name=adapter_name)
    for module, residual in further.items():
        _add_to_base(model, module, residual)


def scaling_of(model: Any, *, adapter_name: str = "default") -> float:
    """The one scaling of an adapter's layers.

    Args:
        model: A `PeftModel`.
        adapter_name: Which adapter.

    Raises:
        AdapterConfigError: If its layers have different ones, or there is none.
    """
    found = {
        float(layer.scaling[adapter_name])
        for layer in model.modules()
        if isinstance(getattr(layer, "scaling", None), dict) and adapter_name in layer.scaling
    }
    if len(found) != 1:
        raise AdapterConfigError(
            f"The adapter {adapter_name!r} has the scalings {sorted(found)}, and averaging needs one for all its modules: "
            "leave out alpha_pattern and rank_pattern."
        )
    return found.pop()


def _config_of(model: Any, adapter_name: str) -> Any:
    """PEFT's configuration of an adapter."""
    if adapter_name not in model.peft_config:
        names = ", ".join(map(repr, model.peft_config))
        raise KeyError(f"{adapter_name!r} is no adapter of the model, which has {names}; pass one of these")
    return model.peft_config[adapter_name]


def _module_of(key: str) -> str:
    """The module of a residual."""
    return key.rpartition(f".{RESIDUE}_")[0]


def _check_shapes(averaged: Mapping[str, Tensor], own: Mapping[str, Tensor], adapter_name: str) -> None:
    """Refuse what `fit_rank` cannot make to fit: it changes the rank of matrices A, and of the B beside them."""
    free: dict[str, int] = {}  # key to the axis that is a rank
    for module, sides in factor_keys(averaged).items():
        if "A" not in sides or any(averaged[key].ndim != 2 or own[key].ndim != 2 for key in sides.values()):
            continue
        free |= {key: "AB".index(side) for side, key in sides.items()}
        if len({averaged[key].shape[free[key]] for key in sides.values()}) > 1:
            shapes = " and ".join(f"{side} {tuple(averaged[key].shape)}" for side, key in sorted(sides.items()))
            raise AdapterConfigError(f"The averaged factors of {module!r} are {shapes}; pass two of one rank.")
    for key, tensor in averaged.items():
        passed, needed = (
            [n for axis, n in enumerate(each.shape) if axis != free.get(key)] for each in (tensor, own[key])
        )
        if passed != needed or tensor.ndim != own[key].ndim:
            raise AdapterConfigError(
                f"The averaged {key!r} has the shape {tuple(tensor.shape)}, and the adapter {adapter_name!r} has "
                f"{tuple(own[key].shape)} there; only the rank of A and B may differ. Average adapters of one base model, "
                "core and head."
            )


def _residual_of(model: nn.Module, module: str, residuals: Mapping[str, Tensor]) -> Tensor:
    """What the rule "fedex" adds to a base weight, laid out as the weight is."""
    layer, base = _with_base(model, module)
    is_transposed = getattr(layer, "fan_in_fan_out", False)
    needed = tuple(base.weight.mT.shape if is_transposed else base.weight.shape)
    pair = [residuals.get(f"{module}.{RESIDUE}_{side}") for side in "BA"]
    shapes: list[tuple[int, ...]] = [() if side is None else tuple(side.shape) for side in pair]
    left, right = pair
    fits = [len(shape) for shape in shapes] == [2, 2] and shapes[0][1] == shapes[1][0]
    if left is None or right is None or not fits or (shapes[0][0], shapes[1][1]) != needed:
        raise AdapterConfigError(
            f"The residual of {module!r} has B {shapes[0] or 'missing'} and A {shapes[1] or 'missing'}, and its base weight is "
            f"{needed}, (out_features, in_features); pass B (out_features, q) and A (q, in_features), as the rule 'fedex' "
            "makes them for linear layers."
        )
    return (left @ right).mT if is_transposed else left @ right


def _with_base(model: nn.Module, module: str) -> tuple[nn.Module, Any]:
    layer = model.get_submodule(module)
    return layer, layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # pyright: ignore[reportCallIssue]


def _add_to_base(model: nn.Module, module: str, residual: Tensor) -> None:
    """W = W_0 + residual of all rounds, W_0 kept bit for bit beside it."""
    _, base = _with_base(model, module)
    if not hasattr(base, _ORIGINAL):
        setattr(base, _ORIGINAL, base.weight.detach().clone())
    with torch.no_grad():
        original = getattr(base, _ORIGINAL)
        base.weight.copy_(original + residual.to(original))
