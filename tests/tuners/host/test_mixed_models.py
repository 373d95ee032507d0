"""Our adapters beside those of PEFT's other methods in one PeftMixedModel, and with PEFT's optimisers for LoRA."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import nn

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.layers.linear import MixedFactor, OutputFactor
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

TARGETS = ["q_proj", "v_proj"]
METHODS = ("moslora", "low_rank", "full", "diagonal")


def config_of(method, **more):
    common = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | more
    if method == "moslora":
        return MosLoraConfig(**common)
    return EigenLoraConfig(subspace=random_subspace(tiny_llama(), TARGETS), core=method, **common)


def mixed(method):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), config_of(method), "ours", mixed=True)
    model.add_adapter("other", LoHaConfig(r=4, target_modules=["v_proj", "o_proj"], init_weights=False))
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_mixed_models_have_our_factors_and_merge(method, tokens):
    model = mixed(method)
    factor = MixedFactor if method == "moslora" else OutputFactor
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert layers
    assert all(isinstance(layer.lora_B["ours"], factor) for layer in layers)
    base = logits(tiny_llama(), tokens)
    alone = logits(model, tokens)
    model.set_adapter(["ours", "other"])
    together = logits(model, tokens)
    assert (alone - base).abs().max() > 1e-4
    assert (together - alone).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_models_train_and_delete(method, tokens):
    model = mixed(method)
    model.set_adapter(["ours", "other"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".ours" in name and p.requires_grad}
    assert before
    train(model, tokens)
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    model.delete_adapter("ours")
    assert model.active_adapters == ["other"]
    assert not any(".ours" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_mixed_models_load_what_was_saved(method, tmp_path, tokens):
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(), config_of(method)).eval()
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftMixedModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path, "again")
    for name in ("default", "again"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), tokens), expected)


def test_plain_lora_in_a_mixed_model_stays_plain(tokens):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS), "plain", mixed=True)
    model.add_adapter("ours", config_of("low_rank"))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert isinstance(layer, Linear)
    assert type(layer.lora_B["plain"]) is nn.Linear
    assert isinstance(layer.lora_B["ours"], OutputFactor)
    model.set_adapter(["plain", "ours"])
    assert torch.isfinite(logits(model, tokens)).all()


@pytest.mark.parametrize("method", METHODS)
def test_loraplus_gives_the_output_side_its_own_rate(method, tokens):
    model = get_peft_model(tiny_llama(), config_of(method))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: rates[id(p)] for name, p in trained.items()} == {
        name: 0.08 if ".lora_B." in name else 0.01 for name in trained
    }
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_lorafa_on_coefficients_is_lorafa_on_the_factors(tokens):
    """One step on C_out is the step on B of a plain LoRA with the same factors, projected onto the components."""
    model = get_peft_model(tiny_llama(), config_of("low_rank"))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    inside, outside = layer.lora_A["default"], layer.lora_B["default"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    before, gradient = outside.coefficients.detach().clone(), outside.coefficients.grad.double()
    frozen = inside.coefficients.detach().clone()
    gram = inside.weight.detach().double() @ inside.weight.detach().double().mT
    projected = gradient @ torch.linalg.inv(gram) / layer.scaling["default"] ** 2
    optimizer.step()
    assert torch.equal(inside.coefficients, frozen)
    assert not torch.equal(outside.coefficients, before)
    first_moment = next(iter(optimizer.state.values()))["exp_avg_B"]  # 0.1 times the gradient, in bfloat16
    tolerance = {"atol": 0.01 * float(projected.abs().max()), "rtol": 0.02}
    torch.testing.assert_close(first_moment.double() / 0.1, projected, **tolerance)


@pytest.mark.parametrize(("method", "reason"), [("moslora", "has a mixer"), ("full", "frozen"), ("diagonal", "frozen")])
def test_lorafa_refuses_what_it_would_pair_wrongly(method, reason):
    model = get_peft_model(tiny_llama(), config_of(method))
    with pytest.raises(AdapterConfigError, match=reason):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)


def test_lorafa_still_takes_plain_lora(tokens):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
