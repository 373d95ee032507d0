"""What our tuners share: LoRA's model with factor modules in the place of its own factors."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.exact_merging import make_exact
from eigenpeft.tuners.swapping import factor_dicts, replace_factor, settle, tuned_layers, weight_name
from eigenpeft.tuners.tied_factors import TransposedFactor


class FactorModel(LoraModel):
    """LoRA's tuner, whose layers get our factor modules as soon as PEFT has made them."""

    # Adapters that `add_weighted_adapter` makes, which are plain LoRA, while it makes them.
    _plain: Sequence[str] = ()

    @abstractmethod
    def _swap(self, layer: LoraLayer, config: Any, adapter_name: str, module: str) -> None:
        """Put factor modules in the place of LoRA's own.

        Args:
            layer: LoRA layer that has just got the adapter.
            config: Configuration of the adapter.
            adapter_name: The adapter.
            module: Name of the adapted weight in the base model.
        """

    def _create_and_replace(
        self, lora_config, adapter_name: str, target, target_name: str, parent, current_key: str, **kwargs
    ) -> None:
        had = isinstance(target, LoraLayer) and adapter_name in factor_dicts(target)[1]
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if adapter_name in self._plain:
            return
        # PEFT extends a layer that it has made before, else it puts a new one in the target's place.
        extended = isinstance(target, LoraLayer) and not had and adapter_name in factor_dicts(target)[1]
        tuned: Any = target if extended else getattr(parent, target_name)
        for module, layer in tuned_layers(tuned, current_key):
            if adapter_name not in factor_dicts(layer)[1]:
                raise AdapterConfigError(
                    f"{module!r} became a {type(layer).__name__} without LoRA's factors, which {type(self).__name__} could "
                    "replace; leave it out with exclude_modules."
                )
            if not self._tie(layer, lora_config, adapter_name, target_name):
                self._swap(layer, lora_config, adapter_name, module)
            settle(layer, adapter_name, config=lora_config, active_adapters=self.active_adapters)

    def _tie(self, layer: LoraLayer, config: LoraConfig, adapter_name: str, target_name: str) -> bool:
        """Share the embedding's factors with a layer that `ensure_weight_tying` ties to it."""
        if not isinstance(layer, Linear) or target_name not in (getattr(config, "target_modules_to_tie", None) or ()):
            return False
        embedding: Any = self.model.get_input_embeddings()
        replace_factor(layer.lora_A, adapter_name, TransposedFactor(embedding.lora_embedding_B[adapter_name]))
        replace_factor(layer.lora_B, adapter_name, TransposedFactor(embedding.lora_embedding_A[adapter_name]))
        return True

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        return make_exact(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

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
            weights: One a name; negative ones subtract.
            adapter_name: Name of the new adapter.
            combination_type: PEFT's own: "svd", "linear", "cat", "ties", and so on.
            **kwargs: PEFT's own.
        """
        if adapter_name in self.peft_config:
            return
        self._plain = (adapter_name,)
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
        finally:
            self._plain = ()
        self.peft_config[adapter_name] = self._plain_config(adapter_name)

    def _plain_config(self, adapter_name: str) -> LoraConfig:
        """LoRA's configuration of an adapter with plain factors, its rank being what the factors have."""
        ours = self.peft_config[adapter_name]
        values: dict[str, Any] = {field.name: getattr(ours, field.name) for field in fields(LoraConfig) if field.init}
        values |= {"peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}}
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and adapter_name in (factors := factor_dicts(layer)[0]):
                factor = factors[adapter_name]
                rank = len(getattr(factor, "weight", factor))
                if rank != layer.r[adapter_name]:  # the sources' core has a rank of its own
                    key = "^" + weight_name(path, layer).replace(".", r"\.")
                    values["rank_pattern"][key] = values["alpha_pattern"][key] = layer.r[adapter_name] = rank
        return LoraConfig(**values)
