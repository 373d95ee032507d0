"""What our tuners share: LoRA's model with factor modules in the place of its own factors."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.adapter_names import without_adapter_name
from eigenpeft.tuners.host.exact_merging import make_exact
from eigenpeft.tuners.host.file_patterns import FIELDS, settle_patterns
from eigenpeft.tuners.host.restrictions import check_sizes
from eigenpeft.tuners.host.twins import copy_frozen, twin_of
from eigenpeft.tuners.layers.kinds import factor_dicts, replace_factor, settle, tuned_layers, weight_name
from eigenpeft.tuners.layers.tied import TransposedFactor

_NOT_COMBINED = {"kasa_config": "KaSA's diagonal between the factors", "use_bdlora": "BD-LoRA's block-diagonal factors"}


class FactorModel(LoraModel):
    """LoRA's tuner, whose layers get our factor modules as soon as PEFT has made them."""

    # Adapters that `add_weighted_adapter` makes, which are plain LoRA, while it makes them.
    _plain: Sequence[str] = ()
    # What `injecting` yielded, while an adapter is injected.
    _given: Any = None

    @staticmethod
    @abstractmethod
    def swap(layer: LoraLayer, *, config: Any, adapter_name: str, module: str, given: Any) -> None:
        """Put factor modules in the place of LoRA's own.

        Args:
            layer: LoRA layer that has just got the adapter.
            config: Configuration of the adapter.
            adapter_name: The adapter.
            module: Name of the adapted weight in the base model.
            given: What `injecting` yielded for the whole adapter.

        Raises:
            AdapterConfigError, SubspaceError, ArtifactError: As the method has it.
        """

    @classmethod
    def has_matrices(cls, config: Any) -> bool:
        """Whether all tensors of an adapter have at least two axes, as PEFT expects of LoRA's.

        Args:
            config: Configuration of the adapter.
        """
        return True

    @classmethod
    @contextmanager
    def injecting(cls, model: nn.Module, *, config: Any, adapter_name: str) -> Iterator[Any]:
        """What a method does once for each adapter, around its injection; nothing here.

        Args:
            model: Model to adapt.
            config: Configuration of the adapter.
            adapter_name: The adapter.

        Yields:
            What `swap` gets for every layer.
        """
        yield None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As LoRA's.

        Args:
            model: Model to adapt.
            adapter_name: Name of the new adapter.
            *args: PEFT's own.
            **kwargs: PEFT's own.

        Raises:
            AdapterConfigError: If the configuration does not fit the model.
            EigenPeftError: As the method's `injecting`, where it opens a subspace, a store or adapters.
        """
        config: Any = self.peft_config[adapter_name]
        if getattr(config, "is_from_file", False):
            check_sizes(model, r=config.r, rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
            write_names(config, model)
        with self.injecting(model, config=self.peft_config[adapter_name], adapter_name=adapter_name) as self._given:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._given = None
        twin = twin_of(self.peft_config, adapter_name)
        if twin is not None:
            copy_frozen(model, adapter_name, twin=twin)

    def _create_and_replace(
        self, lora_config, adapter_name: str, target, target_name: str, parent, current_key: str, **kwargs
    ) -> None:
        had = has_adapter(target, adapter_name)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if adapter_name not in self._plain:
            # PEFT extends a layer that it has made before, else it puts a new one in the target's place.
            extended = not had and has_adapter(target, adapter_name)
            tuned: Any = target if extended else getattr(parent, target_name)
            give_factors(
                self,
                method=type(self),
                tuned=tuned,
                config=lora_config,
                adapter_name=adapter_name,
                target_name=target_name,
                key=current_key,
                given=self._given,
            )

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        return make_exact(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if cls.has_matrices(config):
            # PEFT's warning of tensors that are still sharded, which it gives for its own methods only.
            factors = {key: value for key, value in selected.items() if not key.endswith(".bias")}
            _validate_lora_adapter_state_dict(factors, adapter_name=adapter_name)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **kwargs: Any,
    ) -> None:
        """Combine adapters into a new one, which is plain LoRA: `lora_A` and `lora_B` of the sources are what it takes.

        Args:
            adapters: Names of the adapters to combine.
            weights: One per name; negative ones subtract.
            adapter_name: Name of the new adapter.
            combination_type: PEFT's own: "svd", "linear", "cat", "ties", and so on.
            **kwargs: PEFT's own.

        Raises:
            AdapterConfigError: If an adapter uses something that no combination keeps, or they differ in what all must have.
        """
        if adapter_name in self.peft_config:
            return
        self._check_alike(adapters)
        self._plain = (adapter_name,)
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
        finally:
            self._plain = ()
        sum_biases(self.model, adapters=adapters, weights=weights, new=adapter_name)
        self.peft_config[adapter_name] = self._plain_config(adapter_name)

    def _check_alike(self, adapters: Sequence[str]) -> None:
        """Refuse to combine what the new adapter could not all keep: PEFT copies the first one's options."""
        names = [name for name in adapters if name in self.peft_config]
        for name, (field, what) in itertools.product(names, _NOT_COMBINED.items()):
            if getattr(self.peft_config[name], field, None):
                raise AdapterConfigError(
                    f"{name!r} uses {what} ({field}), which no combination keeps. Merge the adapters into the base model one "
                    "after the other."
                )
        for field in ("lora_bias", "alora_invocation_tokens"):
            values = [getattr(self.peft_config[name], field, None) or None for name in names]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"{name!r} has {value!r}" for name, value in zip(names, values, strict=True))
                raise AdapterConfigError(
                    f"The adapters cannot be combined: their {field} differ ({listed}). Combine adapters that agree."
                )

    def _plain_config(self, adapter_name: str) -> LoraConfig:
        """LoRA's configuration of an adapter with plain factors, its rank being what the factors have."""
        ours = self.peft_config[adapter_name]
        values: dict[str, Any] = {field.name: getattr(ours, field.name) for field in fields(LoraConfig) if field.init}
        values |= {"peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}}
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and adapter_name in factor_dicts(layer)[0]:
                rank = _fill_to_rank(layer, adapter_name)
                if rank != layer.r[adapter_name]:  # the sources' core has a rank of its own
                    key = "^" + weight_name(path, layer).replace(".", r"\.")
                    values["rank_pattern"][key] = values["alpha_pattern"][key] = layer.r[adapter_name] = rank
        return LoraConfig(**values)


def write_names(config: Any, model: nn.Module) -> None:
    """Write into the configuration of an adapter's file the names that its patterns mean (`file_patterns.settle_patterns`).

    Args:
        config: PEFT's configuration of an adapter that is about to be injected, as a file had it.
        model: Model to adapt.

    Raises:
        AdapterConfigError: If a pattern cannot be taken.
    """
    for name, value in settle_patterns({name: getattr(config, name, None) for name in FIELDS}, model).items():
        setattr(config, name, value)


@torch.no_grad()
def sum_biases(model: nn.Module, *, adapters: Sequence[str], weights: Sequence[float], new: str) -> None:
    """Give a combined adapter the weighted sum of its sources' biases (`lora_bias`), whatever became of their factors.

    Args:
        model: Adapted model that has the new adapter already.
        adapters: Sources.
        weights: One per source.
        new: Name of the new adapter.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_bias.get(new):
            outputs: Any = factor_dicts(layer)[1]
            scaled = [
                weight * layer.scaling[name] * outputs[name].bias
                for name, weight in zip(adapters, weights, strict=True)
                if name in outputs
            ]
            outputs[new].bias.copy_(torch.stack(scaled).sum(dim=0) / layer.scaling[new])


@torch.no_grad()
def _fill_to_rank(layer: LoraLayer, adapter_name: str) -> int:
    """Fill plain factors with zeros to the rank that the layer was made with, where the weight itself is narrower.

    PEFT's "svd" cuts each factor at its own side's width then: a weight of 8 x 16 gets an A of 16 rows and a B of 8 columns,
    and the rows without a column belong to no singular value.

    Returns:
        The rank that the factors have then.
    """
    lora_A, lora_B = (
        getattr(factors[adapter_name], "weight", factors[adapter_name]) for factors in factor_dicts(layer)
    )
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return len(lora_A)
    common = min(len(lora_A), lora_B.shape[1])
    lora_A.data, lora_B.data = lora_A[:common], lora_B[:, :common]
    missing = layer.r[adapter_name] - common
    if missing > 0:
        lora_A.data = torch.cat([lora_A, lora_A.new_zeros(missing, *lora_A.shape[1:])])
        lora_B.data = torch.cat([lora_B, lora_B.new_zeros(len(lora_B), missing, *lora_B.shape[2:])], dim=1)
    return len(lora_A)


def has_adapter(layer: Any, adapter_name: str) -> bool:
    """Whether a module is a LoRA layer that has an adapter already.

    Args:
        layer: Any module.
        adapter_name: The adapter.
    """
    return isinstance(layer, LoraLayer) and adapter_name in factor_dicts(layer)[1]


def give_factors(
    tuner: BaseTuner,
    *,
    method: type[FactorModel],
    tuned: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    target_name: str,
    key: str,
    given: Any,
) -> None:
    """Swap the factors of a layer that PEFT has just made or extended.

    Args:
        tuner: Tuner that the layer belongs to: the method's own, or PEFT's mixed one.
        method: Whose factors the layer gets.
        tuned: The layer.
        config: Configuration of the adapter.
        adapter_name: The adapter.
        target_name: Name of the layer in its parent.
        key: Name of the target in the model; of the parameter, for bare parameters.
        given: What the method's `injecting` yielded for the adapter.

    Raises:
        AdapterConfigError: If the layer has none of LoRA's factors.
    """
    for module, layer in tuned_layers(tuned, key):
        if not has_adapter(layer, adapter_name):
            raise AdapterConfigError(
                f"{module!r} became a {type(layer).__name__} without LoRA's factors, which {method.__name__} could "
                "replace; leave it out with exclude_modules."
            )
        tied = isinstance(layer, Linear) and target_name in (getattr(config, "target_modules_to_tie", None) or ())
        if tied:
            _share_factors(tuner.model.get_input_embeddings(), layer, adapter_name)
        else:
            method.swap(layer, config=config, adapter_name=adapter_name, module=module, given=given)
        settle(layer, adapter_name, lora_config=config, active_adapters=tuner.active_adapters)


def _share_factors(embedding: Any, layer: LoraLayer, adapter_name: str) -> None:
    """Share the embedding's factors with a layer that `ensure_weight_tying` ties to it."""
    replace_factor(layer.lora_A, adapter_name, TransposedFactor(embedding.lora_embedding_B[adapter_name]))
    replace_factor(layer.lora_B, adapter_name, TransposedFactor(embedding.lora_embedding_A[adapter_name]))
