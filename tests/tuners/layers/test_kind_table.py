"""The table of layer kinds: each of PEFT's LoRA layers is one row, and its facts are what PEFT made."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from eigenpeft.tuners.layers.kinds import KINDS, factor_dicts, kind_of, weight_shape


class Experts(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


MADE = {
    "linear": (nn.Linear(6, 4), "linear", 1),
    "conv1d of GPT-2": (Conv1D(4, 6), "linear", 1),
    "attention": (nn.MultiheadAttention(4, 2), "linear", 1),
    "embedding": (nn.Embedding(9, 4), "embedding", 1),
    "convolution": (nn.Conv2d(4, 6, (3, 2)), "convolution", 1),
    "groups": (nn.Conv1d(4, 6, 3, groups=2), "convolution", 2),
    "experts": (Experts(3, 6, 4), "experts", 3),
    "parameter": (Experts(6, 4), "parameter", 1),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("made", MADE)
def test_each_layer_is_one_row_with_the_facts_of_what_peft_made(made):
    module, name, n_blocks = MADE[made]
    is_parameter = isinstance(module, Experts)
    targets = {"target_parameters": ["0.weight"], "target_modules": []} if is_parameter else {"target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(module), LoraConfig(r=2, init_lora_weights=False, **targets))
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    kind = kind_of(layer)
    assert (kind.name, kind.n_blocks(layer)) == (name, n_blocks)
    lora_A, lora_B = (getattr(factors["default"], "weight", factors["default"]) for factors in factor_dicts(layer))
    assert len(lora_A) == 2 * (1 if kind.rank_is_split else n_blocks)
    assert weight_shape(layer) == (len(lora_B), lora_A[0].numel())
    other = next(row for row in KINDS if row.attributes != kind.attributes)
    assert not any(len(getattr(layer, attribute)) for attribute in other.attributes)


def test_the_side_that_starts_at_zero_is_pefts():
    for module, name, _ in (MADE["linear"], MADE["embedding"], MADE["convolution"]):
        model = get_peft_model(nn.Sequential(module), LoraConfig(r=2, target_modules=["0"]))
        layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
        sides = [getattr(factors["default"], "weight", factors["default"]) for factors in factor_dicts(layer)]
        zeros = [side for side, tensor in zip(("in", "out"), sides, strict=True) if not tensor.any()]
        assert zeros == [kind_of(layer).zero_side], name
