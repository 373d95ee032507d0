"""Training on top of a merge: the start in the base's weights, λ from rows, and one LoRA that contains both."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from eigenpeft import (
    AdapterCollection,
    AdapterStore,
    EigenLoraConfig,
    MosLoraConfig,
    SubspaceBuilder,
    export_lora,
    merge,
)
from eigenpeft.combining import choose_scale, init_lora_from_merge, merged_start
from eigenpeft.errors import AdapterConfigError, SubspaceError
from tests.tuners.conftest import MODELS, VOCABULARY, is_conv1d, logits, tiny_bert, tiny_llama, train

RANKS = {"first": 4, "second": 2}


@pytest.fixture(params=MODELS)
def architecture(request):
    """(function that makes the model, suffixes of its adapted modules)."""
    return MODELS[request.param]


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapters(architecture, tmp_path):
    for name, rank in RANKS.items():
        config = LoraConfig(r=rank, target_modules=list(architecture[1]), init_lora_weights=False)
        config.fan_in_fan_out = is_conv1d(architecture)
        torch.manual_seed(rank)
        get_peft_model(architecture[0](), config).save_pretrained(tmp_path / name)
    return tmp_path


def reload(architecture, folder):
    return PeftModel.from_pretrained(architecture[0](), folder).eval()


def test_lora_on_top_of_a_merge_is_exported_as_one(architecture, adapters, tokens, tmp_path, caplog):
    base = architecture[0]()
    merge(adapters, rule="ties", density=0.5, progress=False).scaled(2.0).apply_to(base)
    options = {"options": {"density": 0.5}, "scale": 2.0, "r": 3, "task_type": "CAUSAL_LM"}
    model = init_lora_from_merge(architecture[0](), adapters=adapters, rule="ties", **options)
    torch.testing.assert_close(logits(model.eval(), tokens), logits(base, tokens), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    expected = train(model, tokens)
    export_lora(model, tmp_path / "out")
    plain = reload(architecture, tmp_path / "out")
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-5, atol=1e-5)
    assert plain.peft_config["default"].r == sum(RANKS.values()) + 3
    model.save_pretrained(tmp_path / "part")
    assert "holds what was trained on top of the merged start, and not the start itself" in caplog.text


@pytest.mark.parametrize("method", ["eigenlora", "moslora", "fewer modules"])
def test_any_method_on_top_of_a_merge(architecture, adapters, method, tokens, tmp_path):
    common = {"r": 2, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv1d(architecture)}
    base = architecture[0]()
    merged_start(base, adapters=adapters, scale=2.0)
    if method == "eigenlora":
        subspace = SubspaceBuilder(3).fit(AdapterCollection.from_pretrained(adapters)).subspace_
        config = EigenLoraConfig(subspace=subspace, **common)
    else:
        kind = MosLoraConfig if method == "moslora" else LoraConfig
        config = kind(
            target_modules=list(architecture[1]) if method == "moslora" else ["0." + last(architecture)], **common
        )
    model = get_peft_model(base, config)
    expected = train(model, tokens)
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(logits(reload(architecture, tmp_path / "out"), tokens), expected, rtol=1e-5, atol=1e-5)


def last(architecture):
    return {"c_attn": "attn.c_attn"}.get(architecture[1][0], "self_attn.q_proj")


def test_a_store_does_not_lose_the_start(architecture, adapters):
    subspace = SubspaceBuilder(3).fit(AdapterCollection.from_pretrained(adapters)).subspace_
    base = architecture[0]()
    merged_start(base, adapters=adapters)
    model = get_peft_model(base, EigenLoraConfig(subspace=subspace, r=2))
    with pytest.raises(SubspaceError, match=r"was trained on top of a merged start, .*export_lora"):
        AdapterStore(subspace).add(model, name="mine")


def test_refusals(architecture, adapters):
    base = architecture[0]()
    done = merged_start(base, adapters=adapters)
    with pytest.raises(AdapterConfigError, match="starts at a merge already; load the base model anew"):
        merged_start(base, adapters=adapters)
    with pytest.raises(AdapterConfigError, match="scale='auto' compares a merge with what was merged"):
        merged_start(architecture[0](), adapters=done, scale="auto")
    config = LoraConfig(target_modules=list(architecture[1]), fan_in_fan_out=is_conv1d(architecture))
    adapted = get_peft_model(architecture[0](), config)
    with pytest.raises(AdapterConfigError, match="has adapters already; pass the base model"):
        merged_start(adapted, adapters=adapters)
    quantized = architecture[0]()
    name = next(iter(done.factors))
    weight = quantized.get_submodule(name).weight
    quantized.get_submodule(name).weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterConfigError, match=r"whose weight cannot be added to, such as a quantised one"):
        merged_start(quantized, adapters=adapters)


def test_the_scale_that_rows_like_best(tmp_path, tokens):
    """Labels are what the base says with 3 times the mean: of all multipliers that one gets them right."""
    for seed in range(2):
        config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        base = tiny_bert()
        torch.manual_seed(seed)
        get_peft_model(base, config).save_pretrained(tmp_path / f"adapters/{seed}")
    adapters = tmp_path / "adapters"
    teacher = tiny_bert()
    merge(adapters, rule="mean", progress=False).scaled(3.0).apply_to(teacher)
    rows = torch.randint(3, 50, (64, 9), generator=torch.Generator().manual_seed(2))
    model = tiny_bert().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        batches = [
            {"input_ids": part, "labels": teacher(input_ids=part).logits.argmax(dim=1)} for part in rows.split(16)
        ]
    assert choose_scale(model, adapters=adapters, batches=batches, grid=(0.0, 1.0, 3.0, 8.0)) == 3.0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_of_a_language_models_adapters_by_loss(tmp_path, tokens):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config)
    train(model, tokens, steps=8)
    model.save_pretrained(tmp_path / "one")
    batches = [{"input_ids": tokens, "labels": tokens}]
    assert (
        choose_scale(tiny_llama(), adapters=tmp_path / "one", batches=batches, grid=(-1.0, 0.0, 1.0), metric="loss")
        == 1.0
    )
