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
    config = model.peft_config[adapter_name]
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
        AdapterConfigError: If a tensor has no place in the adapter, or its modules have different scalings.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> client = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> averaged = {key: torch.ones_like(tensor) for key, tensor in round_update(client, name="hospital-1").tensors.items()}
        >>> load_round(client, tensors=averaged)
        >>> client.base_model.model[0].lora_A["default"].weight[0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if SEEDS in tensors:
        rebuild(model, tensors)
        return
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    residues = {key: tensor for key, tensor in tensors.items() if f".{RESIDUE}_" in key}
    averaged = {key: tensor for key, tensor in tensors.items() if key not in residues}
    unknown = [key for key in averaged if key not in own]
    if unknown:
        raise AdapterConfigError(
            f"{len(unknown)} of the {len(averaged)} averaged tensors, such as {unknown[0]!r}, have no place in the adapter "
            f"{adapter_name!r}. Give every client the same target modules, core and head."
        )
    mine = scaling_of(model, adapter_name=adapter_name)
    for module, sides in factor_keys(averaged).items():
        rank = len(own[sides["A"]]) if "A" in sides else 0
        part = {key: averaged[key] for key in sides.values()}
        averaged |= fit_rank(part, rank=rank, scaling=mine if scaling is None else scaling, own_scaling=mine)
        residue = [residues.get(f"{module}.{RESIDUE}_{side}") for side in "BA"]
        if residue[0] is not None and residue[1] is not None:
            _add_to_base(model, module, residue[0] @ residue[1])
    set_peft_model_state_dict(model, own | averaged, adapter_name=adapter_name)


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


def _add_to_base(model: nn.Module, module: str, residue: Tensor) -> None:
    """W = W_0 + residue of all rounds, W_0 kept bit for bit beside it."""
    layer = model.get_submodule(module)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # pyright: ignore[reportCallIssue]
    weight = base.weight
    assert isinstance(weight, Tensor)
    if not hasattr(base, _ORIGINAL):
        setattr(base, _ORIGINAL, weight.detach().clone())
    with torch.no_grad():
        original = getattr(base, _ORIGINAL)
        transposed = getattr(layer, "fan_in_fan_out", False)
        weight.copy_(original + (residue.T if transposed else residue).to(original))
