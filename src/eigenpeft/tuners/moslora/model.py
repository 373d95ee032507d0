"""MoSLoRA as a PEFT tuner: LoRA's layers with the B factor replaced by B times a mixer."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.factor_model import FactorModel
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, replace_factor
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
        (inputs, outputs), kind = factor_dicts(layer), kind_of(layer)
        n_blocks = kind.n_blocks(layer)
        mixer = initial_mixer(
            layer.r[adapter_name] // (n_blocks if kind.rank_is_split else 1),
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
            mixed = kind.mixed(outputs[adapter_name], mixer=mixer, train_mixer=config.train_mixer)
            replace_factor(outputs, adapter_name, mixed)


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
