"""MoSLoRA as a PEFT tuner: LoRA's layers with the B factor replaced by B times a mixer."""

from peft.tuners.lora import LoraLayer, LoraModel

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.factors import MixedFactor, initial_mixer
from eigenpeft.tuners.moslora.config import MosLoraConfig
from eigenpeft.tuners.swapping import settle, tuned_layer


class MosLoraModel(LoraModel):
    """Tuner behind `MosLoraConfig`; made by `get_peft_model`."""

    def _create_and_replace(
        self,
        lora_config: MosLoraConfig,
        adapter_name: str,
        target,
        target_name: str,
        parent,
        current_key: str,
        **kwargs,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = tuned_layer(parent, target_name)
        self._mix(layer, lora_config, adapter_name, current_key)
        settle(layer, adapter_name, config=lora_config, active_adapters=self.active_adapters)

    @staticmethod
    def _mix(layer: LoraLayer, config: MosLoraConfig, adapter_name: str, module: str) -> None:
        replaced = dict(layer.lora_B).get(adapter_name)
        if replaced is None or getattr(replaced, "groups", 1) != 1:
            raise AdapterConfigError(
                f"MoSLoRA does not define a mixer for {module!r} ({type(layer.get_base_layer()).__name__}); it takes "
                "linear layers, Conv1D and convolutions without groups. Leave it out with exclude_modules."
            )
        mixer = initial_mixer(layer.r[adapter_name], init=config.init_mixer)
        layer.lora_B[adapter_name] = MixedFactor(replaced, mixer=mixer)
