"""Adapters keep their tensors whatever the adapters beside them are called."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.tuners.host.adapter_names import owner
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

NAMES = ["0", "layers", "q_proj", "weight", "bias", "base_layer", "modules_to_save", "embed_tokens"]
OURS = ["coefficients", "factor", "mixer", "components", "default2", "lora_A"]


def config(kind, subspace):
    options = {"r": 4, "modules_to_save": ["lm_head"], "bias": "lora_only", "task_type": "CAUSAL_LM"}
    if kind == "eigenlora":
        return EigenLoraConfig(subspace=subspace, **options)
    return MosLoraConfig(target_modules=["q_proj", "v_proj"], **options)


@pytest.mark.parametrize("kind", ["eigenlora", "moslora"])
def test_the_other_adapters_name_takes_nothing_away(tmp_path, tokens, kind):
    base = {"attention_bias": True, "num_hidden_layers": 1}
    subspace = random_subspace(tiny_llama(**base), ["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(**base), config(kind, subspace))
    expected = train(model, tokens, steps=1)
    alone = get_peft_model_state_dict(model)
    for other in NAMES + OURS:
        second = config(kind, subspace)
        second.bias = "none"
        model.add_adapter(other, second)
        beside = get_peft_model_state_dict(model)
        assert beside.keys() == alone.keys(), other
        assert all(torch.equal(beside[key], alone[key]) for key in alone), other
        own = get_peft_model_state_dict(model, adapter_name=other)
        assert own.keys() == {key for key in alone if not key.endswith("base_layer.bias")}, other
        if other == OURS[-1]:
            model.save_pretrained(tmp_path, selected_adapters=["default"])
        model.delete_adapter(other)
    back = PeftModel.from_pretrained(tiny_llama(**base), tmp_path).eval()
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["weight", "components", "lora_B"])
def test_an_adapter_keeps_its_own_tensors_under_any_name(tmp_path, tokens, name):
    subspace = random_subspace(tiny_llama(num_hidden_layers=1), ["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(num_hidden_layers=1), config("eigenlora", subspace), adapter_name=name)
    expected = train(model, tokens, steps=1)
    assert model.peft_config[name].embeds_subspace
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), tmp_path / name, adapter_name=name).eval()
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "adapter"),
    [
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "default"),
        ("base_model.model.layers.0.q_proj.lora_B.mixer.mixer", "mixer"),
        ("base_model.model.embed.lora_embedding_A.default", "default"),
        ("base_model.model.score.modules_to_save.0.weight", "0"),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta.one", "one"),
        ("base_model.model.layers.0.q_proj.base_layer.bias", None),
        ("base_model.vera_A.default", None),
    ],
)
def test_the_owner_of_a_tensor_stands_behind_the_container(key, adapter):
    assert owner(key) == adapter
