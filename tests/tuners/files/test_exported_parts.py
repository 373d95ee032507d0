"""export_lora: whatever was trained beside the factors comes out too, or is refused by name."""

import json
from dataclasses import fields

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn

from eigenpeft import EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.files.lora_fields import KEPT, REFUSED, TRAINING, WRITTEN
from tests.tuners.conftest import logits, needs_own_adapters, random_subspace, tiny_bert, tiny_llama, train


def base():
    return tiny_llama(attention_bias=True, num_hidden_layers=1)


def configs(**options):
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}
    subspace = random_subspace(base(), ["q_proj", "v_proj"])
    return {
        "eigenlora": EigenLoraConfig(subspace=subspace, **options),
        "diagonal": EigenLoraConfig(subspace=subspace, core="diagonal", **options),
        "moslora": MosLoraConfig(target_modules=["q_proj", "v_proj"], **options),
        "lora": LoraConfig(target_modules=["q_proj", "v_proj"], **options),
    }


PARTS = {
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "lora_bias": {"lora_bias": True},
    "lora_bias and several alphas": {"lora_bias": True, "alpha_pattern": {"v_proj": 3}},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("kind", "part"),
    [*((kind, part) for kind in ("eigenlora", "moslora") for part in PARTS), ("diagonal", "lora_bias")],
)
def test_trained_parts_come_out_with_the_same_logits(tmp_path, tokens, kind, part):
    model = get_peft_model(base(), configs(**PARTS[part])[kind])
    expected = train(model, tokens, steps=2)
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (logits(base(), tokens) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_tied_tokens_come_out(tmp_path, tokens):
    tied = {"tie_word_embeddings": True}
    model = get_peft_model(
        tiny_llama(**tied),
        MosLoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM"),
    )
    expected = train(model, tokens, steps=2)
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(tiny_llama(**tied), tmp_path).eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_invocation_tokens_come_out(tmp_path, tokens):
    model = get_peft_model(base(), configs(alora_invocation_tokens=[7, 8])["eigenlora"])
    tokens[0, 4:6] = torch.tensor([7, 8])  # the other rows never invoke the adapter
    expected = train(model, tokens, steps=2)
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected[1:], logits(base(), tokens)[1:], atol=1e-5, rtol=1e-5)
    assert (expected[0] - logits(base(), tokens)[0]).abs().max() > 1e-3


def compiled(model):
    return torch.compile(model)


def in_two_wrappers(model):
    wrapper = nn.Module()  # as DistributedDataParallel and DeepSpeed's engine keep the model
    wrapper.module = torch.compile(model)
    return wrapper


@pytest.mark.parametrize(("kind", "wrap"), [("eigenlora", in_two_wrappers), ("moslora", compiled)])
def test_wrapped_models_are_exported_as_the_model_inside(tmp_path, tokens, kind, wrap):
    model = get_peft_model(base(), configs(modules_to_save=["lm_head"])[kind])
    expected = train(model, tokens, steps=2)
    export_lora(wrap(model), tmp_path)
    plain = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["eigenlora", "moslora"])
def test_a_base_compiled_before_it_was_adapted_is_exported_under_its_own_names(tmp_path, tokens, kind):
    config = configs(modules_to_save=["lm_head"])[kind]
    model = get_peft_model(torch.compile(base()), config)
    assert not any("_orig_mod" in name for name in model.peft_config["default"].target_modules)
    with torch.compiler.set_stance("force_eager"):  # the wrapper and its names, without a compiler
        expected = train(model, tokens, steps=2)
    export_lora(model, tmp_path)
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    plain = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


@needs_own_adapters
def test_a_model_that_transformers_adapted_is_exported_with_its_head(tmp_path, tokens):
    model = base()
    model.add_adapter(MosLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), "mine")
    expected = train(model, tokens, steps=2)
    export_lora(model, tmp_path, adapter_name="mine")
    plain = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_without_a_task_type_loads_by_the_class_of_its_base(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = tiny_bert()
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    export_lora(get_peft_model(model, MosLoraConfig(r=2, target_modules=["query"])), tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["auto_mapping"] is not None
    assert type(AutoPeftModel.from_pretrained(tmp_path / "lora").get_base_model()) is type(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base model's own"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"kasa_config": KasaConfig()}, r"KaSA, which cuts .* \(kasa_config\)"),
        ({"use_dora": True}, "DoRA, whose update is not a product"),
    ],
)
def test_what_a_plain_lora_cannot_say_is_refused_by_name(tmp_path, options, message):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], **options))
    with pytest.raises(AdapterConfigError, match=message):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_option_of_a_newer_peft_is_refused_and_not_lost(tmp_path, monkeypatch):
    from eigenpeft.tuners.files import lora_fields

    monkeypatch.setattr(lora_fields, "_KNOWN", lora_fields._KNOWN - {"layers_pattern"})
    model = get_peft_model(
        base(), LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")
    )
    with pytest.raises(AdapterConfigError, match="sets layers_pattern, which this version of eigenpeft does not know"):
        export_lora(model, tmp_path / "lora")


def test_every_option_of_lora_has_its_place():
    places = (*KEPT, *WRITTEN, *TRAINING, *REFUSED)
    assert len(set(places)) == len(places)
    assert {field.name for field in fields(LoraConfig)} <= set(places)
