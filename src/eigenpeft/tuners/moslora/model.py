"""MoSLoRA as a PEFT tuner: LoRA's layers with the B factor replaced by B times a mixer."""

from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.factor_model import FactorModel
from eigenpeft.tuners.layers.blocks import MixedBlockFactor, n_blocks_of
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, replace_factor
from eigenpeft.tuners.moslora.config import MosLoraConfig
from eigenpeft.tuners.moslora.start import initial_mixer, unmixed


class MosLoraModel(FactorModel):
    """Tuner behind `MosLoraConfig`; made by `get_peft_model`."""

    @staticmethod
    def swap(layer: LoraLayer, *, config: MosLoraConfig, adapter_name: str, module: str, given: None = None) -> None:
        """`FactorModel.swap`: `B M` in the place of LoRA's B, or the mixer's start folded into LoRA's own factors.

        Raises:
            AdapterConfigError: If `fold`, or a start that writes A and B, is asked of a layer whose mixer has blocks.
        """
        (inputs, outputs), kind = factor_dicts(layer), kind_of(layer)
        n_blocks, is_split = kind.n_blocks(layer), kind.rank_is_split
        n_parts = max(
            n_blocks_of(inputs[adapter_name]), n_blocks_of(outputs[adapter_name])
        )  # of block-diagonal factors
        if n_parts > 1:
            n_blocks, is_split = n_parts, True
        mixer = initial_mixer(
            layer.r[adapter_name] // (n_blocks if is_split else 1),
            init=config.mixer_start,
            n_blocks=n_blocks if n_blocks > 1 else None,
        )
        if config.fold:
            if config.writes_factors:
                return  # B M⁻¹ M A is what PEFT has written already
            if n_blocks > 1:
                raise AdapterConfigError(
                    f"fold=True is not defined for {module!r}, whose mixer has {n_blocks} blocks; leave it out with "
                    "exclude_modules."
                )
            fold_start(layer, inputs[adapter_name], outputs[adapter_name], mixer=mixer)
        else:
            made = MixedBlockFactor if n_parts > 1 else kind.mixed
            mixed = made(outputs[adapter_name], mixer=mixer, train_mixer=config.train_mixer)
            if config.writes_factors and n_blocks > 1:
                raise AdapterConfigError(
                    f"init_lora_weights={config.init_lora_weights!r} is not defined for {module!r}, whose mixer has {n_blocks} "
                    "blocks; leave it out with exclude_modules."
                )
            if config.writes_factors and not mixed.factor.is_meta:
                mixed.factor.data = unmixed(mixed.factor, mixer)
            replace_factor(outputs, adapter_name, mixed)
            if layer.frozen_peft_weight_names.get(adapter_name):
                mixed.freeze_factor()  # and not the whole module: the mixer is MoSLoRA's own
                names = layer.frozen_peft_weight_names
                layer.frozen_peft_weight_names = {name: names[name] for name in names if name != adapter_name}

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: MosLoraConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        # PEFT notes for its own LoRA alone that neither the start nor the converted adapter changes the base once more.
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        return super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, output_state_dict, kwargs
        )

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Convert an adapter whose start changed the base model (PiSSA, OLoRA, CorDA) to one on the published model.

        `B M A - B_0 M_0 A_0 = [B, -B_0] diag(M, M_0) [A; A_0]`, MoSLoRA of twice the rank.

        Args:
            output_state_dict: The trained adapter's tensors.
            adapter_name: The adapter as it started, loaded beside it.
            kwargs: Further arguments of `save_pretrained`; PEFT reads "state_dict".
        """
        given = kwargs or {}
        start = get_peft_model_state_dict(self, state_dict=given.get("state_dict"), adapter_name=adapter_name)  # pyright: ignore[reportArgumentType]
        mixers = {key: value for key, value in output_state_dict.items() if key.endswith(".mixer")}
        factors = {key: value for key, value in output_state_dict.items() if key not in mixers}
        converted = super().subtract_mutated_init(factors, adapter_name, given)
        pairs = {key: (mixer, start[key.partition(".")[2]]) for key, mixer in mixers.items()}
        return converted | {key: torch.block_diag(mixer, first.to(mixer)) for key, (mixer, first) in pairs.items()}


@torch.no_grad()
def fold_start(layer: LoraLayer, lora_A: Any, lora_B: Any, *, mixer: Tensor) -> None:
    """Multiply the mixer's start into the factor that is not zero, so that a plain LoRA starts as MoSLoRA would.

    Args:
        layer: LoRA layer.
        lora_A: Its A.
        lora_B: Its B, the side that is not zero for embeddings.
        mixer: (r, r).
    """
    if kind_of(layer).zero_side == "in":
        lora_B.copy_(lora_B @ mixer.to(lora_B))
    else:
        lora_A.weight.copy_(torch.einsum("sr,r...->s...", mixer.to(lora_A.weight), lora_A.weight))
