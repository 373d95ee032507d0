"""The reader beside PEFT itself: what PEFT saves is read as the update that PEFT computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import CollectionError
from tests.factories import tiny_bert, tiny_gpt2, tiny_llama

MODELS = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, ["c_attn", "mlp.c_proj"]),
    "bert": (tiny_bert, ["query", "output.dense"]),
}


def adapted(kind, *, seed=0, **config):
    """A tiny model with an adapter whose numbers are all random, and the module names it adapts."""
    make, targets = MODELS[kind]
    model = get_peft_model(make(), LoraConfig(target_modules=targets, fan_in_fan_out=kind == "gpt2", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def updates(model):
    """Module name to ΔW (out_features, in_features) as PEFT merges it."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            delta_weight = module.get_delta_weight("default").detach()
            found[name] = delta_weight.mT if isinstance(module.get_base_layer(), Conv1D) else delta_weight
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 3, "rank_pattern": {"v_proj": 5, r".*\.0\.attn\.c_attn": 2, "layer.1.attention.self.query": 1}},
        {"r": 2, "alpha_pattern": {"q_proj": 20, "c_attn": 1, "dense": 7}, "lora_alpha": 6, "use_rslora": True},
        {"r": 2, "init_lora_weights": "orthogonal"},
    ],
    ids=lambda config: ",".join(config),
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_updates_are_those_of_peft(tmp_path, kind, config):
    model = adapted(kind, **config)
    model.save_pretrained(tmp_path / "one")
    collection = AdapterCollection.from_pretrained(tmp_path / "one")
    expected = updates(model)
    assert set(collection.modules) == set(expected)
    for module in collection.modules:
        (read,) = collection.factors(module)
        assert (len(read.lora_B), read.lora_A.shape[1]) == collection.shapes[module] == expected[module].shape
        torch.testing.assert_close(read.lora_B @ read.lora_A, expected[module])
        assert collection.fan_in_fan_out(module) == (kind == "gpt2")


def test_heads_saved_by_peft_are_kept_aside(tmp_path):
    model = adapted("bert", r=2, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.adapters[0].kept_aside == (
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    )
    assert collection.adapters[0].task_type == "SEQ_CLS"


def test_embedding_factors_are_kept_aside(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert {module.rsplit(".", 1)[1] for module in collection.modules} == {"q_proj"}
    assert [key.rsplit(".", 1)[1] for key in collection.adapters[0].kept_aside] == [
        "lora_embedding_A",
        "lora_embedding_B",
    ]


def test_embedding_factors_are_read_when_asked_for(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with AdapterCollection.from_pretrained(tmp_path, embeddings=True) as collection:
        (module,) = collection.modules
        (read,) = collection.factors(module)
        assert collection.is_embedding(module)
        update = model.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
        torch.testing.assert_close((read.lora_B @ read.lora_A).mT, update)


def test_dora_saved_by_peft_is_refused(tmp_path):
    adapted("llama", r=2, use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(CollectionError, match="use_dora=True: DoRA also rescales"):
        AdapterCollection.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_is_refused_until_converted(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    original = {name: parameter.clone() for name, parameter in tiny_llama().named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(CollectionError, match="'pissa', which alters the base weights.*convert it"):
        AdapterCollection.from_pretrained(tmp_path / "unconverted")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    collection = AdapterCollection.from_pretrained(tmp_path / "converted")
    merged = model.merge_and_unload()
    for module in collection.modules:
        (read,) = collection.factors(module)
        change = merged.get_submodule(module).weight - original[f"{module}.weight"]
        torch.testing.assert_close(read.lora_B @ read.lora_A, change.detach(), rtol=1e-3, atol=1e-4)
