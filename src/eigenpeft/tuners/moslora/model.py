"""MoSLoRA as a PEFT tuner: LoRA's layers with the B factor replaced by B times a mixer."""

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper

from eigenpeft.tuners.convolution_factors import MixedConvolutionFactor, is_convolution
from eigenpeft.tuners.embedding_factors import MixedEmbeddingFactor
from eigenpeft.tuners.expert_factors import MixedExpertFactor
from eigenpeft.tuners.factor_model import FactorModel
from eigenpeft.tuners.factors import MixedFactor
from eigenpeft.tuners.moslora.config import MosLoraConfig
from eigenpeft.tuners.moslora.start import initial_mixer
from eigenpeft.tuners.swapping import factor_dicts, replace_factor


class MosLoraModel(FactorModel):
    """Tuner behind `MosLoraConfig`; made by `get_peft_model`."""

    def _swap(self, layer: LoraLayer, config: MosLoraConfig, adapter_name: str, module: str) -> None:
        factors = factor_dicts(layer)[1]
        mixed = mixed_factor(layer, factors[adapter_name], adapter_name, config=config)
        replace_factor(factors, adapter_name, mixed)


def mixed_factor(layer: LoraLayer, replaced: Any, adapter_name: str, *, config: MosLoraConfig) -> MixedFactor:
    """The factor `B M` that takes the place of a layer's B.

    Args:
        layer: LoRA layer.
        replaced: Its B: a linear layer, a convolution, or an embedding's bare matrix.
        adapter_name: Adapter that it belongs to.
        config: Its configuration.
    """
    rank = layer.r[adapter_name]
    if isinstance(layer, Embedding):
        return MixedEmbeddingFactor(replaced, mixer=initial_mixer(rank, init=config.init_mixer))
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        mixers = initial_mixer(rank, init=config.init_mixer, n_blocks=layer.num_experts)
        return MixedExpertFactor(replaced, mixer=mixers)
    if is_convolution(layer.get_base_layer()):
        groups = replaced.groups
        n_blocks = groups if groups > 1 else None
        mixer = initial_mixer(rank // groups, init=config.init_mixer, n_blocks=n_blocks)
        return MixedConvolutionFactor(replaced, mixer=mixer)
    return MixedFactor(replaced, mixer=initial_mixer(rank, init=config.init_mixer))
