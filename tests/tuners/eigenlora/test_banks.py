"""EigenLoRA on banks that several layers share and on sides with different numbers of components."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import AdapterBank, AdapterStore, EigenLoraConfig, PrincipalSubspace, export_lora
from eigenpeft.errors import AdapterConfigError, SubspaceError
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train


@pytest.fixture
def subspace():
    """One bank for all v_proj, (9, 7) components; tiny Llama has two of them."""
    found = random_subspace(tiny_llama(), ["v_proj"]).truncate((9, 7))
    return PrincipalSubspace(dict.fromkeys(found, next(iter(found.values()))), info=found.info)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@pytest.mark.parametrize("core", ["low_rank", "full"])
@pytest.mark.parametrize("save_subspace", ["reference", "embed"])
def test_trains_saves_loads_and_exports(subspace, tokens, tmp_path, core, save_subspace):
    subspace.save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=subspace, r=4, core=core, save_subspace=save_subspace, task_type="CAUSAL_LM")
    base = logits(tiny_llama(), tokens)
    model = get_peft_model(tiny_llama(), config)
    torch.testing.assert_close(logits(model, tokens), base, atol=1e-6, rtol=0)
    numbers = {"low_rank": 4 * (9 + 7), "full": 9 * 7}[core]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers * len(layers(model))
    expected = train(model, tokens)
    assert (expected - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), expected)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_components", [None, 5])
def test_layers_share_the_components_of_one_bank(subspace, n_components):
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=4, n_components=n_components))
    bases = {id(layer.lora_A["default"].frozen_bank) for layer in layers(model)}
    assert len(bases) == 1 < len(layers(model))
    own = random_subspace(tiny_llama(), ["v_proj"])
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=own, r=4, n_components=n_components))
    assert len({id(layer.lora_A["default"].frozen_bank) for layer in layers(model)}) == len(layers(model))


def test_a_diagonal_needs_pairs(subspace):
    with pytest.raises(SubspaceError, match="core='diagonal' pairs each component .* there are 9 and 7"):
        get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, core="diagonal"))


@pytest.mark.parametrize("count", [0, [3], [3, 4, 5], "3", [3, 10**9], True, None])
def test_embedded_counts_of_a_file_are_checked(subspace, tmp_path, count):
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=4, save_subspace="embed"))
    model.save_pretrained(tmp_path)
    config = EigenLoraConfig.from_pretrained(tmp_path)
    module = next(iter(config.embedded_n_components))
    assert config.embedded_n_components[module] == [9, 7]
    config.embedded_n_components[module] = count
    config.subspace_sha256 = "0" * 64
    with pytest.raises(AdapterConfigError, match="must be a number of components|embeds no components"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)


@pytest.mark.parametrize("core", ["low_rank", "full"])
def test_a_store_and_a_bank_serve_what_was_trained(subspace, tokens, tmp_path, core):
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=4, core=core, task_type="CAUSAL_LM"))
    expected = train(model, tokens)
    store = AdapterStore(subspace)
    store.add(model, name="trained")
    store.save_pretrained(tmp_path / "store")
    opened = AdapterStore.from_pretrained(tmp_path / "store")
    assert opened.subspace.bank_of == subspace.bank_of
    base, bank = tiny_llama().eval(), AdapterBank.from_store(opened)
    with bank.attached(base), bank.use(["trained", "__base__", "trained"]):
        served = logits(base, tokens)
    torch.testing.assert_close(served[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(served[1], logits(tiny_llama(), tokens)[1], rtol=1e-5, atol=1e-6)
