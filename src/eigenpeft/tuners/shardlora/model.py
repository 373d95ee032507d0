"""LoRA with shared shards as a PEFT tuner: layers whose factors are made once all of an adapter's layers are known."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.tuners.host.factor_model import FactorModel
from eigenpeft.tuners.shardlora.config import ShardLoraConfig
from eigenpeft.tuners.shardlora.pools import Placed, check_index, check_layer, share_factors


class ShardLoraModel(FactorModel):
    """Tuner behind `ShardLoraConfig`; made by `get_peft_model`."""

    @classmethod
    @contextmanager
    def injecting(cls, model: nn.Module, *, config: ShardLoraConfig, adapter_name: str) -> Iterator[list[Placed]]:
        """Collect the adapter's layers, and afterwards give them factors: how large a pool is depends on how many share it.

        Args:
            model: Model to adapt.
            config: Configuration of the adapter.
            adapter_name: The adapter.

        Yields:
            The list that `swap` adds layers to.

        Raises:
            AdapterConfigError: If a pool has fewer vectors than a layer needs, or `shards_per_vector` does not divide a width.
        """
        layers: list[Placed] = []
        yield layers
        init: Any = config.init_lora_weights
        share_factors(
            layers,
            adapter_name,
            sharing=config.sharing,
            share=config.share,
            pool_rank=config.pool_rank,
            private_rank=config.private_rank,
            shards_per_vector=config.shards_per_vector,
            seed=config.seed,
            init=init,
        )

    @staticmethod
    def swap(layer: LoraLayer, *, config: ShardLoraConfig, adapter_name: str, module: str, given: list[Placed]) -> None:
        """`FactorModel.swap`: note the layer, which keeps LoRA's own factors until all layers are known.

        Raises:
            AdapterConfigError: If the layer is not linear.
        """
        check_layer(layer, module)
        given.append((module, layer))

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        check_index(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
