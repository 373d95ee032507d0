"""The default targets of EigenLoRA: what the subspace and the model have in common, and what is said of the rest."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft import EigenLoraConfig, PrincipalSubspace, export_lora
from eigenpeft.errors import AdapterConfigError
from tests.tuners.conftest import random_subspace, tiny_llama

SUFFIXES = ("q_proj", "v_proj")


def adapted(model):
    return [
        name.removeprefix("base_model.model.") for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
    ]


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, {"0", "1"}),
        ({"layers_to_transform": [1]}, {"1"}),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {"0"}),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, {"0", "1"}),
    ],
)
def test_layers_to_transform_chooses_as_for_lora(settings, layers):
    model = tiny_llama()
    model = get_peft_model(model, EigenLoraConfig(subspace=random_subspace(model, SUFFIXES), r=2, **settings))
    assert {name.split(".layers.")[1][0] for name in adapted(model)} == layers


def test_layers_that_are_nowhere_are_an_error():
    model = tiny_llama()
    config = EigenLoraConfig(subspace=random_subspace(model, SUFFIXES), r=2, layers_to_transform=[9])
    with pytest.raises(AdapterConfigError, match=r"layers_to_transform=\[9\] .* leaves none of the 4 modules"):
        get_peft_model(model, config)


def test_modules_that_the_model_lacks_are_named_once():
    model = tiny_llama()
    whole = random_subspace(model, SUFFIXES)
    renamed = {name.replace("1.self_attn.q_proj", "1.experts.0.w1"): bases for name, bases in whole.items()}
    with pytest.warns(UserWarning, match=r"1 of the subspace's 4 modules are not in the model .*'.*experts\.0\.w1'"):
        model = get_peft_model(model, EigenLoraConfig(subspace=PrincipalSubspace(renamed), r=2))
    assert len(adapted(model)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), EigenLoraConfig(subspace=whole, r=2))


def test_one_subspace_is_not_put_on_two_towers():
    towers = nn.ModuleDict({"text": tiny_llama().model, "vision": tiny_llama().model})
    subspace = random_subspace(tiny_llama().model, SUFFIXES)
    with pytest.raises(AdapterConfigError, match=r"fit several of ModuleDict: .* could be 'text\..*' or 'vision\..*'"):
        get_peft_model(towers, EigenLoraConfig(subspace=subspace, r=2))
    names = [f"text.{name}" for name in subspace]
    assert adapted(get_peft_model(towers, EigenLoraConfig(subspace=subspace, r=2, target_modules=names))) == names


class Towers(nn.Module):
    """One tower inside another's name: "layers.0.q" and "vision.layers.0.q"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})])
        self.vision = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})])})

    def forward(self, x):
        return self.layers[0]["q"](x) + self.vision["layers"][0]["q"](2 * x)


def test_a_name_inside_a_longer_one_is_not_adapted_with_it(tmp_path):
    subspace = random_subspace(Towers(), ["layers.0.q"], n_components=4)
    subspace = PrincipalSubspace({"layers.0.q": subspace["layers.0.q"]})
    model = get_peft_model(Towers(), EigenLoraConfig(subspace=subspace, r=2, init_lora_weights=False))
    assert adapted(model) == ["layers.0.q"]
    x = torch.randn(3, 8)
    expected = model(x)
    model.save_pretrained(tmp_path / "ours")
    assert adapted(PeftModel.from_pretrained(Towers(), tmp_path / "ours")) == ["layers.0.q"]
    export_lora(model, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of modules without tensors
        plain = PeftModel.from_pretrained(Towers(), tmp_path / "lora")
    assert adapted(plain) == ["layers.0.q"]
    torch.testing.assert_close(plain(x), expected)


def test_two_modules_never_share_one_basis():
    subspace = PrincipalSubspace(
        {"layers.0.q": random_subspace(Towers(), ["layers.0.q"], n_components=4)["layers.0.q"]}
    )
    with pytest.raises(
        AdapterConfigError, match=r"'layers.0.q' and 'vision.layers.0.q' are both targeted and both fit"
    ):
        get_peft_model(Towers(), EigenLoraConfig(subspace=subspace, r=2, target_modules=["q"]))
    pattern = EigenLoraConfig(subspace=subspace, r=2, exclude_modules="nothing")
    with pytest.raises(AdapterConfigError, match=r"'vision.layers.0.q' would be adapted too, .* is a pattern"):
        get_peft_model(Towers(), pattern)
