"""LoRA at the principal components: plain LoRA in memory, in trainers and on disk, with ΔW = 0 and nothing left behind."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainingArguments

from eigenpeft import PrincipalSubspace
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners import init_lora_from_subspace, lora_config_from_subspace
from eigenpeft.tuners.layers.kinds import factor_dicts
from tests.peft_suite.random_subspaces import random_subspace as whole_subspace
from tests.tuners.conftest import logits, needs_own_adapters, random_subspace, tiny_llama, train
from tests.tuners.layers.test_kinds import KINDS


@pytest.fixture
def subspace(architecture):
    return random_subspace(architecture[0](), architecture[1])


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def sides(layer):
    return (getattr(factors["default"], "weight", factors["default"]) for factors in factor_dicts(layer))


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_starts_at_the_components_and_every_row_can_learn(architecture, subspace, side, tokens):
    model = init_lora_from_subspace(architecture[0](), subspace=subspace, side=side, r=4, task_type="CAUSAL_LM")
    assert torch.equal(logits(model.eval(), tokens), logits(architecture[0](), tokens))
    layers = lora_layers(model)
    assert {name.removeprefix("base_model.model.") for name in layers} == set(subspace.modules)
    for name, layer in layers.items():
        bank, (lora_A, lora_B) = subspace[name.removeprefix("base_model.model.")], sides(layer)
        n_in, n_out = {"in": (4, 0), "out": (0, 4), "both": (2, 2)}[side]
        assert torch.equal(lora_A, torch.cat([bank.components_in[:n_in], torch.zeros(n_out, lora_A.shape[1])]))
        assert torch.equal(lora_B.mT, torch.cat([torch.zeros(n_in, len(lora_B)), bank.components_out[:n_out]]))
    train(model, tokens, steps=3)  # the first step moves the side that is zero, the next both
    for name, layer in lora_layers(model).items():
        started = subspace[name.removeprefix("base_model.model.")]
        lora_A, lora_B = sides(layer)
        assert (lora_A.abs().sum(dim=1) > 0).all()
        assert (lora_B.abs().sum(dim=0) > 0).all()
        assert not torch.equal(lora_A[0], started.components_in[0])


def test_is_plain_lora_everywhere(architecture, subspace, tokens, tmp_path):
    model = init_lora_from_subspace(architecture[0](), subspace=subspace, r=3, task_type="CAUSAL_LM")
    assert model.peft_type.value == "LORA"
    expected = train(model, tokens)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert not [key for key in saved if key not in LoraConfig().to_dict()]
    again = PeftModel.from_pretrained(architecture[0](), tmp_path)
    assert type(again.peft_config["default"]) is LoraConfig
    assert torch.equal(logits(again.eval(), tokens), expected)
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), expected)
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(architecture[1])))


def test_every_way_of_injecting_starts_there(architecture, subspace):
    config = lora_config_from_subspace(subspace, r=3, task_type="CAUSAL_LM")
    first = get_peft_model(architecture[0](), config)
    second = inject_adapter_in_model(copy.deepcopy(config), architecture[0]())
    states = [list(get_peft_model_state_dict(first).values()), lora_state(second)]
    assert all(len(state) == 2 * len(subspace) for state in states)
    for state in states[1:]:
        assert all(torch.equal(one, other) for one, other in zip(states[0], state, strict=True))


def lora_state(model):
    return [value for key, value in model.state_dict().items() if ".lora_" in key]


@needs_own_adapters
def test_transformers_own_add_adapter_starts_there(architecture, subspace):
    config = lora_config_from_subspace(subspace, r=3, task_type="CAUSAL_LM")
    first, own = get_peft_model(architecture[0](), copy.deepcopy(config)), architecture[0]()
    own.add_adapter(config)
    assert len(lora_state(own)) == 2 * len(subspace)
    assert all(torch.equal(one, other) for one, other in zip(lora_state(first), lora_state(own), strict=True))


def test_targets_that_the_subspace_lacks_start_as_lora_does(tokens):
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    model = init_lora_from_subspace(tiny_llama(), subspace=subspace, r=3, target_modules=["q_proj", "o_proj"])
    by_name = lora_layers(model)
    assert len(by_name) == 4
    for name, layer in by_name.items():
        lora_A, lora_B = sides(layer)
        assert lora_A.any()
        assert not lora_B.any()
        own = name.removeprefix("base_model.model.")
        assert (own in subspace) == name.endswith("q_proj")
        if own in subspace:
            assert torch.equal(lora_A, subspace[own].components_in[:3])


def test_a_subspace_of_the_same_base_under_another_head():
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    inner = PrincipalSubspace({f"other.{name}": subspace[name] for name in subspace}, info=subspace.info)
    layers = lora_layers(init_lora_from_subspace(tiny_llama(), subspace=inner, r=2))
    assert len(layers) == 2
    assert all(torch.equal(next(sides(layer)), subspace[name[17:]].components_in[:2]) for name, layer in layers.items())


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_other_kinds_of_layer(kind, side):
    make, shape, _ = KINDS[kind]
    torch.manual_seed(0)
    base = make().eval()
    x = torch.arange(shape).view(2, -1) if isinstance(shape, int) else torch.randn(shape)
    expected = base(x)
    subspace = whole_subspace(base, parameters=False)
    model = init_lora_from_subspace(base, subspace=subspace, side=side, r=2, target_modules=["target"]).eval()
    torch.testing.assert_close(model(x), expected)
    ((name, layer),) = lora_layers(model).items()
    lora_A, lora_B = sides(layer)
    bank = subspace[name.removeprefix("base_model.model.")]
    if side == "in":
        assert torch.equal(lora_A.flatten(1), bank.components_in[:2])
    else:
        assert torch.equal(lora_B.flatten(1).mT, bank.components_out[:2])


def test_trains_in_transformers_trainer(tokens, tmp_path):
    subspace = random_subspace(tiny_llama(), ["q_proj", "v_proj"])
    model = init_lora_from_subspace(tiny_llama(), subspace=subspace, r=4, task_type="CAUSAL_LM")
    before = logits(model.eval(), tokens)
    arguments = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], use_cpu=True, learning_rate=0.1, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model, arguments, train_dataset=rows).train()
    assert (logits(model.eval(), tokens) - before).abs().max() > 1e-3


def test_refusals():
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    for settings, message in (
        ({"side": "left"}, r"side='left' must be one of 'in', 'out', 'both'"),
        ({"side": "both", "r": 3}, r"side='both' starts half of the rank on each side, and r=3 is odd"),
        ({"r": 0}, "r=0 must be a whole number of at least 1: the rank of the LoRA"),
        ({"side": "both", "r": "2"}, "r='2' must be a whole number of at least 1"),
        ({"r": 16}, r"r=16 with side='in' needs 16 components, and 'model.layers.0.self_attn.q_proj' has 12"),
        (
            {"rank_pattern": {"q_proj": 2}},
            r"has LoRA factors for 32 x 32 of rank 2, and the start is 32 x 32 of rank 8",
        ),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            init_lora_from_subspace(tiny_llama(), subspace=subspace, **settings)
    with pytest.raises(AdapterConfigError, match=r"None of the 2 modules of the start, .* is in the model \(Linear\)"):
        init_lora_from_subspace(nn.Linear(2, 2), subspace=subspace)
    with pytest.raises(ValueError, match=r"Target modules \{?.*nowhere.* not found in the base model"):
        init_lora_from_subspace(tiny_llama(), subspace=subspace, target_modules=["nowhere"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        lora_config_from_subspace(subspace, ranks=2)
