"""EigenLoRA as a PEFT tuner: LoRA's layers with both factors replaced by coefficients on frozen components."""

import math
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import PrincipalSubspace
from eigenpeft.tuners.basis_store import Basis, attach_basis, attach_empty_basis, drop_unused_bases, recall, resolve
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.eigenlora.layer import adopt
from eigenpeft.tuners.eigenlora.warm_start import read_warm_start
from eigenpeft.tuners.factors import InputFactor, OutputFactor, input_factor
from eigenpeft.tuners.swapping import settle, tuned_layer

_EMBEDDED = {"lora_A": "components_in", "lora_B": "components_out"}


class EigenLoraModel(LoraModel):
    """Tuner behind `EigenLoraConfig`; made by `get_peft_model`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Find the subspace, choose its modules when no targets are named, then inject as LoRA does.

        Args:
            model: Model to adapt.
            adapter_name: Name of the new adapter.
            *args: PEFT's own.
            **kwargs: PEFT's own.
        """
        config = cast(EigenLoraConfig, self.peft_config[adapter_name])
        subspace = _subspace_of(config)
        if config.target_modules is None:
            config.target_modules = _matching_modules(model, subspace, config)  # pyright: ignore[reportAttributeAccessIssue]
        if subspace is not None and subspace.info.fan_in_fan_out:
            config.fan_in_fan_out = True  # the adapters' Conv1D; PEFT would set it with a warning
        self._subspace_in_use = subspace
        self._warm_start = read_warm_start(config.init_from, subspace) if config.init_from and subspace else None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._subspace_in_use = self._warm_start = None
        config.init_from = None
        if config.embeds_subspace:
            config.embedded_n_components = {
                name: len(input_factor(layer, adapter_name).basis.components_in)
                for name, layer in model.named_modules()
                if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
            }

    def _create_and_replace(
        self,
        lora_config: EigenLoraConfig,
        adapter_name: str,
        target,
        target_name: str,
        parent,
        current_key: str,
        **kwargs,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = tuned_layer(parent, target_name)
        if not isinstance(dict(layer.lora_B).get(adapter_name), nn.Linear):
            raise AdapterConfigError(
                f"EigenLoRA takes linear layers and Conv1D; {current_key!r} is a {type(layer.get_base_layer()).__name__}"
                ". Leave it out with exclude_modules."
            )
        self._swap(layer, lora_config, adapter_name, current_key)
        adopt(layer, adapter_name)
        settle(layer, adapter_name, config=lora_config, active_adapters=self.active_adapters)

    def _swap(self, layer: LoraLayer, config: EigenLoraConfig, adapter_name: str, module: str) -> None:
        name, basis = _basis_for(layer, self._subspace_in_use, config, module)
        rank, n_components = layer.r[adapter_name], len(basis.components_in)
        coefficients_in, coefficients_out = initial_coefficients(n_components, rank=rank, core=config.core)
        if self._warm_start is not None:
            coefficients_in, coefficients_out = self._warm_start.coefficients(
                name, start=(coefficients_in, coefficients_out), core=config.core, scaling=layer.scaling[adapter_name]
            )
        layer.lora_A[adapter_name] = InputFactor(basis, coefficients=coefficients_in)
        layer.lora_B[adapter_name] = OutputFactor(basis, coefficients=coefficients_out)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the bases that no other adapter uses.

        Args:
            adapter_name: Adapter to delete.
        """
        super().delete_adapter(adapter_name)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                drop_unused_bases(layer)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.embeds_subspace:
            for name, layer in model.named_modules():
                if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                    basis = input_factor(layer, adapter_name).basis
                    for factor, side in _EMBEDDED.items():
                        selected[f"{name}.{factor}.components"] = getattr(basis, side)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        coefficients = {key: value for key, value in state_dict.items() if not key.endswith(".components")}
        embedded = {key: value for key, value in state_dict.items() if key.endswith(".components")}
        if embedded:
            _fill_embedded(model, adapter_name, embedded)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, coefficients)


def initial_coefficients(n_components: int, *, rank: int, core: str) -> tuple[Tensor | None, Tensor]:
    """The start ΔW = 0, one-sided: with zeros on both sides no gradient would ever flow (a saddle).

    Args:
        n_components: K.
        rank: r of the low-rank core.
        core: "low_rank", "mixer" or "diagonal".

    Returns:
        Coefficients of the input side, (r, K) or None, and of the output side, (K, r), (K, K) or (K,).
    """
    if core == "mixer":
        return None, torch.zeros(n_components, n_components)
    if core == "diagonal":
        return None, torch.zeros(n_components)
    # As LoRA starts A: rows of A = C_in V_in get the norm that LoRA's rows have, V_in being orthonormal.
    coefficients_in = nn.init.kaiming_uniform_(torch.empty(rank, n_components), a=math.sqrt(5))
    return coefficients_in, torch.zeros(n_components, rank)


def _subspace_of(config: EigenLoraConfig) -> PrincipalSubspace | None:
    """The subspace, or None when the adapter's own file brings the components."""
    subspace = recall(config.subspace_sha256)
    if subspace is None and config.embedded_n_components is not None:
        return None
    if subspace is None:
        if config.subspace is None and config.subspace_sha256 is None:
            raise AdapterConfigError(
                "EigenLoRA needs a subspace: pass EigenLoraConfig(subspace=...) a path, a Hub id, or the "
                "PrincipalSubspace that SubspaceBuilder made."
            )
        place = config.subspace if isinstance(config.subspace, str) else None
        subspace = resolve(place, revision=config.subspace_revision, sha256=config.subspace_sha256)
    config._subspace = subspace  # keeps it alive, and findable for the next adapter
    config.subspace_sha256 = subspace.fingerprint
    return subspace


def _matching_modules(model: nn.Module, subspace: PrincipalSubspace | None, config: EigenLoraConfig) -> set[str]:
    names = tuple(subspace.modules) if subspace is not None else tuple(config.embedded_n_components or ())
    wanted = set()
    for name, _ in model.named_modules():
        plain = name.removesuffix(".base_layer")
        found = subspace.find(plain) if subspace is not None else next((n for n in names if n == plain), None)
        if plain and found is not None:
            wanted.add(plain)
    if not wanted:
        raise AdapterConfigError(
            f"None of the subspace's {len(names)} modules, such as {names[0]!r}, is in the model "
            f"({type(model).__name__}). Use a model of the base that the subspace was built for."
        )
    return wanted


def _basis_for(
    layer: LoraLayer, subspace: PrincipalSubspace | None, config: EigenLoraConfig, module: str
) -> tuple[str, Basis]:
    fingerprint = config.subspace_sha256 or ""
    if subspace is None:
        count = (config.embedded_n_components or {}).get(module)
        if count is None:
            raise AdapterConfigError(
                f"The adapter embeds no components for {module!r}; it has them for "
                f"{sorted(config.embedded_n_components or ())[:3]}."
            )
        return module, attach_empty_basis(layer, n_components=count, fingerprint=fingerprint)
    name = subspace.find(module)
    if name is None:
        raise AdapterConfigError(
            f"{module!r} is targeted but not in the subspace of {len(subspace)} modules, such as {subspace.modules[0]!r}. "
            "Leave target_modules out to adapt exactly the subspace's modules."
        )
    bases = subspace[name]
    if (bases.out_features, bases.in_features) != (layer.out_features, layer.in_features):
        raise AdapterConfigError(
            f"{module!r} is {layer.out_features} x {layer.in_features} in the model and {bases.out_features} x "
            f"{bases.in_features} in the subspace: it was built for another base model."
        )
    if config.n_components is not None:
        bases = bases.truncate(config.n_components)
    return name, attach_basis(layer, bases, fingerprint=fingerprint)


def _fill_embedded(model: nn.Module, adapter_name: str, embedded: dict[str, Tensor]) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        basis = input_factor(layer, adapter_name).basis
        for factor, side in _EMBEDDED.items():
            key = f"{name}.{factor}.components"
            saved = embedded.get(key, embedded.get(f"base_model.model.{key}"))
            if saved is not None:
                held = getattr(basis, side)
                setattr(basis, side, saved.to(device=held.device, dtype=held.dtype))
