"""A copy of an adapter as TRL makes its reference: the same configuration, then the parameters alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

MODULES = ("q_proj", "v_proj")


def config_of(method, tmp_path):
    subspace = random_subspace(tiny_llama(), MODULES)
    for seed, name in enumerate(("one", "two")):
        base = tiny_llama()
        torch.manual_seed(seed)
        config = LoraConfig(r=3, target_modules=list(MODULES), init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / "sources" / name)
    adapters = AdapterCollection.from_pretrained(tmp_path / "sources")
    common = {"r": 4, "task_type": "CAUSAL_LM"}
    if method == "moslora":
        return MosLoraConfig(train_mixer=False, init_mixer="orthogonal", target_modules=list(MODULES), **common)
    if method == "mixture":
        return EigenLoraConfig(core="mixture", sources=AdapterStore.from_collection(subspace, adapters), **common)
    start = {"init_from": "mean", "init_adapters": adapters} if method == "offset" else {}
    return EigenLoraConfig(subspace=subspace, save_subspace="embed", **start, **common)


def add_reference(model):
    """As trl.DPOTrainer does with a model that has an adapter already."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("method", ["mixture", "offset", "embedded", "moslora"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_the_reference_is_the_adapter(method, reloaded, tokens, tmp_path):
    model = get_peft_model(tiny_llama(), config_of(method, tmp_path))
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    if reloaded:  # nothing else knows its subspace and sources any more
        del model
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    add_reference(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), tokens), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model.eval(), tokens), expected)
    assert (expected - logits(tiny_llama(), tokens)).abs().max() > 1e-4
