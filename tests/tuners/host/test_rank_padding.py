"""Adapters of several ranks swapped into one model that PEFT has prepared for it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.errors import AdapterConfigError
from tests.tuners.conftest import logits, random_subspace, tiny_llama

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def subspace(tmp_path):
    """Saved, since adapters that embed their components cannot be swapped."""
    random_subspace(tiny_llama(), TARGETS).save_pretrained(tmp_path / "subspace")
    return str(tmp_path / "subspace")


def adapter(subspace, *, rank, core="low_rank"):
    settings = {"target_modules": TARGETS, "init_lora_weights": False}
    torch.manual_seed(rank)
    return get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=rank, core=core, **settings)).eval()


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
def test_padding_changes_nothing_and_other_ranks_swap_in(subspace, tokens, tmp_path, core):
    expected = {}
    for rank in (3, 6):
        model = adapter(subspace, rank=rank, core=core)
        expected[rank] = logits(model, tokens)
        model.save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "3").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model, tokens), expected[3], atol=1e-6, rtol=1e-6)
    for rank in (6, 3):
        hotswap_adapter(model, str(tmp_path / str(rank)), adapter_name="default")
        torch.testing.assert_close(logits(model, tokens), expected[rank], atol=1e-6, rtol=1e-6)
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name} == {"coefficients"}


def test_padded_adapters_train(subspace, tokens):
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=3, target_modules=TARGETS))
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_what_cannot_be_padded_is_refused(subspace):
    with pytest.raises(AdapterConfigError, match="target rank 2, but the original rank is larger"):
        prepare_model_for_compiled_hotswap(adapter(subspace, rank=3), target_rank=2)
    diagonal = get_peft_model(tiny_llama(), MosLoraConfig(r=3, target_modules=TARGETS, kasa_config={}))
    before = {name: p.shape for name, p in diagonal.named_parameters()}
    with pytest.raises(AdapterConfigError, match="it has blocks, or a diagonal between its factors"):
        prepare_model_for_compiled_hotswap(diagonal, target_rank=8)
    assert {name: p.shape for name, p in diagonal.named_parameters()} == before


@pytest.mark.parametrize("settings", [{}, {"train_mixer": False}])
def test_mixers_grow_with_zeros_and_other_ranks_swap_in(tokens, tmp_path, settings):
    expected = {}
    for rank in (3, 6):
        torch.manual_seed(rank)
        config = MosLoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False, **settings)
        model = get_peft_model(tiny_llama(), config).eval()
        expected[rank] = logits(model, tokens)
        model.save_pretrained(tmp_path / str(rank))
    assert (expected[3] - expected[6]).abs().max() > 1e-2
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "3").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model, tokens), expected[3], atol=1e-6, rtol=1e-6)
    for rank in (6, 3):
        hotswap_adapter(model, str(tmp_path / str(rank)), adapter_name="default")
        torch.testing.assert_close(logits(model, tokens), expected[rank], atol=1e-6, rtol=1e-6)
    assert all(tensor.shape == (8, 8) for name, tensor in model.state_dict().items() if name.endswith("mixer"))


class Picture(nn.Module):
    def __init__(self, groups):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv(x)


# PEFT warns of groups.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_behind_mixers_are_padded(tmp_path, groups):
    x, expected = torch.randn(2, 4, 5, 5), {}
    for rank in (2, 4):
        torch.manual_seed(rank)
        model = get_peft_model(Picture(groups), MosLoraConfig(r=rank, target_modules=["conv"], init_lora_weights=False))
        expected[rank] = model(x).detach()
        model.save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(Picture(groups), tmp_path / "2").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    for rank in (2, 4, 2):
        hotswap_adapter(model, str(tmp_path / str(rank)), adapter_name="default")
        torch.testing.assert_close(model(x), expected[rank], atol=1e-5, rtol=1e-5)


def test_plain_lora_is_padded_by_peft(tokens):
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=TARGETS))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert all(
        isinstance(module, nn.Linear) and 8 in module.weight.shape
        for name, module in model.named_modules()
        if name.endswith((".lora_A.default", ".lora_B.default"))
    )
    assert torch.isfinite(logits(model, tokens)).all()


def test_tensors_saved_while_they_are_sharded_are_told(subspace, tmp_path):
    model = adapter(subspace, rank=3)
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    factor.coefficients.data = factor.coefficients.data.flatten()  # as FSDP and ZeRO-3 leave them
    with pytest.warns(UserWarning, match="FSDP shards"):
        model.save_pretrained(tmp_path)
