"""Modules of a model and names from adapter files: one report, and PEFT's reading of LoRA files as the judge."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eigenpeft.subspace.matching import match_modules
from tests.factories import random_factors, write_adapter


def tree(*paths, size=(3, 2)):
    """Linear modules (out 3, in 2) at dotted paths."""
    root = nn.Module()
    for path in paths:
        parent = root
        *above, leaf = path.split(".")
        for name in above:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, nn.Linear(size[1], size[0]))
    return root


@pytest.mark.parametrize(
    ("paths", "names", "found", "missing", "contested"),
    [
        (["h.0.q", "h.1.q"], ["h.1.q", "h.0.q"], {"h.0.q": "h.0.q", "h.1.q": "h.1.q"}, (), {}),
        (["h.0.q"], ["transformer.h.0.q"], {"h.0.q": "transformer.h.0.q"}, (), {}),
        (["transformer.h.0.q"], ["h.0.q"], {"transformer.h.0.q": "h.0.q"}, (), {}),
        (["h.0.q"], ["h.0.v"], {}, ("h.0.v",), {}),
        (["a.proj"], ["c_proj"], {}, ("c_proj",), {}),
        # One name, two towers.
        (["text.0.q", "vision.0.q"], ["0.q"], {}, (), {"0.q": ("text.0.q", "vision.0.q")}),
        # The whole name says which.
        (["0.q", "vision.0.q"], ["0.q"], {"0.q": "0.q"}, (), {}),
        (["text.0.q", "vision.0.q"], ["text.0.q"], {"text.0.q": "text.0.q"}, (), {}),
        # Two names that mean one module, of which one is its own.
        (["a.q"], ["a.q", "q"], {"a.q": "a.q"}, ("q",), {}),
        (["a.q"], ["x.a.q", "y.a.q"], {}, (), {"x.a.q": ("a.q",), "y.a.q": ("a.q",)}),
    ],
)
def test_reports(paths, names, found, missing, contested):
    matches = match_modules(tree(*paths), names)
    assert (dict(matches.found), matches.missing, dict(matches.contested)) == (found, missing, contested)


def test_shapes_choose_between_towers():
    model = tree("text.0.q")
    model.add_module("vision", tree("0.q", size=(5, 2)))
    assert match_modules(model, ["0.q"], shapes={"0.q": (5, 2)}).found == {"vision.0.q": "0.q"}
    assert set(match_modules(model, ["0.q"], shapes={"0.q": (9, 9)}).contested) == {"0.q"}


def test_a_layer_that_has_an_adapter_is_the_module_it_was():
    model = tree("h.0.q")
    model.h.get_submodule("0").q.add_module("base_layer", nn.Linear(2, 3))
    assert match_modules(model, ["h.0.q"]).found == {"h.0.q": "h.0.q"}


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    ).eval()


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="transformers 5 renamed these modules")
@pytest.mark.parametrize(
    "prefix",
    ["language_model.model.layers", "model.language_model.layers", "base_model.model.language_model.model.layers"],
)
def test_old_and_new_spellings_of_a_vision_language_model_are_where_peft_loads_them(llava, prefix, tmp_path):
    name = f"{prefix.removeprefix('base_model.model.')}.1.self_attn.q_proj"
    folder = write_adapter(
        tmp_path, random_factors(modules={name: (32, 32)}), target_modules=r".*language_model.*1.*\.q_proj"
    )
    found = match_modules(llava, [name]).found
    model = PeftModel.from_pretrained(llava, folder)
    trained = [
        path.removeprefix("base_model.model.").removesuffix(".lora_B.default")
        for path, module in model.named_modules()
        if path.endswith("lora_B.default") and module.weight.abs().sum() > 0
    ]
    model.unload()
    assert list(found) == trained == ["model.language_model.layers.1.self_attn.q_proj"]
