"""MoSLoRA as a PEFT tuner: LoRA's layers with the B factor replaced by B times a mixer."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.factor_model import FactorModel
from eigenpeft.tuners.layers.convolution import MixedConvolutionFactor, is_convolution
from eigenpeft.tuners.layers.embedding import MixedEmbeddingFactor
from eigenpeft.tuners.layers.experts import MixedExpertFactor
from eigenpeft.tuners.layers.kinds import factor_dicts, replace_factor
from eigenpeft.tuners.layers.linear import MixedFactor
from eigenpeft.tuners.moslora.config import MosLoraConfig
from eigenpeft.tuners.moslora.start import initial_mixer


class MosLoraModel(FactorModel):
    """Tuner behind `MosLoraConfig`; made by `get_peft_model`."""

    @staticmethod
    def swap(layer: LoraLayer, config: MosLoraConfig, adapter_name: str, module: str, given: None = None) -> None:
        """`FactorModel.swap`: `B M` in the place of LoRA's B, or the mixer's start folded into LoRA's own factors.

        Raises:
            AdapterConfigError: If `fold` is asked of a layer whose mixer has blocks.
        """
        inputs, outputs = factor_dicts(layer)
        n_blocks = _n_blocks(layer, outputs[adapter_name])
        mixer = initial_mixer(
            layer.r[adapter_name] // (n_blocks if is_convolution(layer.get_base_layer()) else 1),
            init=config.init_mixer,
            n_blocks=n_blocks if n_blocks > 1 else None,
        )
        if config.fold:
            if n_blocks > 1:
                raise AdapterConfigError(
                    f"fold=True is not defined for {module!r}, whose mixer has {n_blocks} blocks; leave it out with "
                    "exclude_modules."
                )
            fold_start(layer, inputs[adapter_name], outputs[adapter_name], mixer=mixer)
        else:
            mixed = mixed_factor(layer, outputs[adapter_name], mixer=mixer, train_mixer=config.train_mixer)
            replace_factor(outputs, adapter_name, mixed)


def _n_blocks(layer: LoraLayer, replaced: Any) -> int:
    """In how many blocks the channels that a mixer mixes fall: groups of a convolution, experts of a parameter."""
    if isinstance(layer, ParamWrapper):
        return layer.num_experts
    return replaced.groups if is_convolution(layer.get_base_layer()) else 1


def mixed_factor(layer: LoraLayer, replaced: Any, *, mixer: Tensor, train_mixer: bool) -> MixedFactor:
    """The factor `B M` that takes the place of a layer's B.

    Args:
        layer: LoRA layer.
        replaced: Its B: a linear layer, a convolution, or an embedding's bare matrix.
        mixer: Its start.
        train_mixer: Whether it is trained.
    """
    if isinstance(layer, Embedding):
        return MixedEmbeddingFactor(replaced, mixer=mixer, train_mixer=train_mixer)
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        return MixedExpertFactor(replaced, mixer=mixer, train_mixer=train_mixer)
    if is_convolution(layer.get_base_layer()):
        return MixedConvolutionFactor(replaced, mixer=mixer, train_mixer=train_mixer)
    return MixedFactor(replaced, mixer=mixer, train_mixer=train_mixer)


@torch.no_grad()
def fold_start(layer: LoraLayer, lora_A: Any, lora_B: Any, *, mixer: Tensor) -> None:
    """Multiply the mixer's start into the factor that is not zero, so that a plain LoRA starts as MoSLoRA would.

    Args:
        layer: LoRA layer.
        lora_A: Its A.
        lora_B: Its B, the side that is not zero for embeddings.
        mixer: (r, r).
    """
    if isinstance(layer, Embedding):
        lora_B.copy_(lora_B @ mixer.to(lora_B))
    else:
        lora_A.weight.copy_(torch.einsum("sr,r...->s...", mixer.to(lora_A.weight), lora_A.weight))
