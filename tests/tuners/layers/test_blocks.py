"""Block-diagonal LoRA and KaSA in our layers: nothing joins two blocks, and the diagonal stands between the factors."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from eigenpeft import AdapterStore, EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.errors import AdapterConfigError, SubspaceError
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

LAYERS = ["q_proj", "v_proj"]
BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}


def base():
    return tiny_llama(num_hidden_layers=1)


def adapted(method, **options):
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    if method is MosLoraConfig:
        return get_peft_model(base(), MosLoraConfig(target_modules=LAYERS, **options))
    return get_peft_model(base(), EigenLoraConfig(subspace=random_subspace(base(), LAYERS), **options))


def blocks(**options):
    return {"use_bdlora": BdLoraConfig(**(BLOCKS | options))}


def layers_of(model):
    return {name.rpartition(".")[2]: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig])
@pytest.mark.parametrize("option", ["use_bdlora", "kasa_config"])
def test_it_trains_comes_back_and_merges(tmp_path, tokens, method, option):
    model = adapted(method, **(blocks() if option == "use_bdlora" else {option: KasaConfig()}))
    with model.disable_adapter():
        start = logits(model, tokens)
    torch.testing.assert_close(logits(model, tokens), start)
    assert torch.equal(start, logits(base(), tokens)) == (option == "use_bdlora")  # KaSA cuts the base model's weights
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(model, tokens)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == trained
    assert any("lora_diag" in name for name in trained) == (option == "kasa_config")
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(back, tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig])
def test_kasa_s_penalty_is_that_of_the_factors_and_reaches_what_is_trained(method):
    model = adapted(method, kasa_config=KasaConfig(beta=0.5, gamma=0.25), init_lora_weights=False)
    expected = 0.0
    for layer in layers_of(model).values():
        A, B = (factors["default"].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
        eye = torch.eye(4, dtype=torch.float64)
        penalty = (B.T @ B - eye).norm() + (A @ A.T - eye).norm()
        expected += 0.5 * layer.lora_diag["default"].detach().double().square().sum() + 0.25 * penalty
    loss = model.base_model._get_kasa_loss()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig])
def test_no_two_blocks_are_joined(tokens, method):
    model = adapted(method, **blocks())
    train(model, tokens)
    found = layers_of(model)
    for name, side in (("q_proj", "lora_A"), ("v_proj", "lora_B")):
        weight = getattr(found[name], side)["default"]
        weight = weight.weight_as_blockdiagonal_matrix() if hasattr(weight, "nblocks") else weight.weight
        rows, columns = (size // 2 for size in weight.shape)
        assert not weight[:rows, columns:].any()
        assert not weight[rows:, :columns].any()
        assert weight[:rows, :columns].abs().max() > 0
        assert weight[rows:, columns:].abs().max() > 0
    if method is MosLoraConfig:
        assert found["q_proj"].lora_B["default"].mixer.shape == (2, 2, 2)


def test_blocks_of_eigenlora_are_those_of_the_dense_factors(tokens):
    model = adapted(EigenLoraConfig, **blocks())
    train(model, tokens)
    for name, side in (("q_proj", "lora_A"), ("v_proj", "lora_B")):
        factor = getattr(layers_of(model)[name], side)["default"]
        components = factor.frozen_bank.components_in if side == "lora_A" else factor.frozen_bank.components_out
        coefficients = factor.coefficients.detach().double()
        inside = side == "lora_A"
        dense = coefficients @ components.double() if inside else components.double().T @ coefficients
        rows, columns = (size // 2 for size in dense.shape)
        dense[:rows, columns:] = dense[rows:, :columns] = 0
        torch.testing.assert_close(factor.weight.detach().double(), dense, atol=1e-6, rtol=1e-5)
        x = torch.randn(3, 5, dense.shape[1])
        torch.testing.assert_close(factor(x).double(), x.double() @ dense.T, atol=1e-5, rtol=1e-5)


def test_an_identity_mixer_held_fixed_is_lora_with_blocks_and_with_kasa(tokens):
    for options in (blocks(), {"kasa_config": KasaConfig()}):
        options = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options}
        torch.manual_seed(1)
        theirs = get_peft_model(base(), LoraConfig(**options))
        torch.manual_seed(1)
        ours = get_peft_model(base(), MosLoraConfig(init_mixer="identity", train_mixer=False, **options))
        torch.testing.assert_close(train(ours, tokens), train(theirs, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig, LoraConfig])
def test_blocks_are_exported_as_matrices(tmp_path, tokens, method):
    if method is LoraConfig:
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
        model = get_peft_model(base(), LoraConfig(**options, **blocks()))
    else:
        model = adapted(method, **blocks())
    expected = train(model, tokens)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(base(), tmp_path / "plain").eval()
    assert plain.peft_config["default"].use_bdlora is None
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["use_bdlora", "kasa_config"])
def test_what_a_subspace_or_a_combination_cannot_keep_is_refused(tmp_path, option):
    options = blocks() if option == "use_bdlora" else {option: KasaConfig()}
    subspace = random_subspace(base(), LAYERS)
    with pytest.raises(AdapterConfigError, match=f"{option} needs core='low_rank' .here 'full'."):
        EigenLoraConfig(subspace=subspace, core="full", **options)
    model = get_peft_model(base(), EigenLoraConfig(subspace=subspace, r=4, **options))
    with pytest.raises(SubspaceError, match=f"has {option}=.* A store does not keep such adapters; keep its folder"):
        AdapterStore(subspace).add(model, name="one")
    model.add_adapter("other", EigenLoraConfig(subspace=subspace, r=4, **options))
    with pytest.raises(AdapterConfigError, match=rf"'default' uses .* \({option}\), which no combination keeps"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "linear")
    with pytest.raises(AdapterConfigError, match="fold=True .* not defined with kasa_config or use_bdlora"):
        MosLoraConfig(fold=True, **options)
