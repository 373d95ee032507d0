"""LoRA that goes on from an adapter: the same update, whatever its rank, alpha and rsLoRA, and another head."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners import init_lora_from_adapter, lora_config_from_adapter
from tests.tuners.conftest import is_conv1d, logits, tiny_bert


@pytest.fixture
def adapters(architecture, tmp_path):
    for name, rank in (("first", 4), ("second", 2)):
        config = LoraConfig(r=rank, lora_alpha=3, use_rslora=True, target_modules=list(architecture[1]))
        config.fan_in_fan_out, config.init_lora_weights = is_conv1d(architecture), False
        torch.manual_seed(rank)
        get_peft_model(architecture[0](), config).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("lora", [{}, {"r": 6, "lora_alpha": 24}, {"use_rslora": True}])
def test_starts_where_the_adapter_is(architecture, adapters, lora, tokens):
    expected = logits(PeftModel.from_pretrained(architecture[0](), adapters / "first").eval(), tokens)
    collection = AdapterCollection.from_pretrained(adapters)
    for source, name in ((collection, "first"), (adapters / "first", None)):
        model = init_lora_from_adapter(architecture[0](), adapters=source, name=name, **lora)
        assert model.peft_config["default"].r == lora.get("r", 4)
        torch.testing.assert_close(logits(model.eval(), tokens), expected, rtol=1e-4, atol=2e-6)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


def test_a_member_of_a_store_starts_as_it_lies_in_the_bases(architecture, adapters):
    collection = AdapterCollection.from_pretrained(adapters)
    store = AdapterStore.from_collection(SubspaceBuilder(3).fit(collection).subspace_, collection)
    model = init_lora_from_adapter(architecture[0](), adapters=store, name="second")
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            left, right = store.factors("second", module=name)
            update = right.mT @ left.mT if is_conv1d(architecture) else left @ right
            torch.testing.assert_close(layer.get_delta_weight("default"), update)


def test_takes_no_head(tmp_path, tokens):
    old = get_peft_model(tiny_bert(3), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in old.named_parameters():
        parameter.data += 0.1 if "lora_" in name else 0.0
    old.save_pretrained(tmp_path / "old")
    model = init_lora_from_adapter(tiny_bert(5), adapters=tmp_path / "old", task_type="SEQ_CLS")
    assert model(input_ids=tokens).logits.shape[1] == 5
    pairs = zip(*([m for m in model.modules() if isinstance(m, LoraLayer)] for model in (old, model)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_refuses_names_that_are_not_there(architecture, adapters):
    collection = AdapterCollection.from_pretrained(adapters)
    for name in (None, "third"):
        with pytest.raises(AdapterConfigError, match=rf"name={name!r} is not one of the 2 adapters: 'first', 'second'"):
            init_lora_from_adapter(architecture[0](), adapters=collection, name=name)


def test_refuses_what_cannot_start(tmp_path):
    get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path)
    for settings, message in (
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"r": 2.0}, "r=2.0 must be a whole number of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 makes every update 0, and the adapter could not start where '.*' is"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            lora_config_from_adapter(tmp_path, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        lora_config_from_adapter(tmp_path, ranks=2)
    with pytest.raises(
        AdapterConfigError, match=r"of rank 1, and the start is 32 x 32 of rank 2; choose r of at least that"
    ):
        init_lora_from_adapter(tiny_bert(), adapters=tmp_path, r=1)
    with pytest.raises(ValueError, match=r"Target modules \{?.*nowhere.* not found in the base model"):
        init_lora_from_adapter(tiny_bert(), adapters=tmp_path, target_modules=["nowhere"])
