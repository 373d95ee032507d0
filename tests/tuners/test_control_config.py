"""A control trains the same run in everything but what it takes away."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import AdapterCollection, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.errors import AdapterConfigError, SubspaceError
from eigenpeft.subspace import ModuleSubspace, mean_only_subspace, random_subspace, shuffled_subspace
from eigenpeft.tuners import control_config, same_parameters_lora
from eigenpeft.tuners.controls import CONTROLS
from tests.factories import make_collection, tiny_llama

NAMES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]


@pytest.fixture
def adapters(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules=dict.fromkeys(NAMES, (16, 16)), noise=0.1)
    return AdapterCollection.from_pretrained(made.folder)


@pytest.fixture
def subspace(adapters):
    return SubspaceBuilder(8).fit(adapters).subspace_


def trained(config):
    model = get_peft_model(tiny_llama(), config)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(config):
    return sum(p.numel() for p in trained(config).values())


@pytest.mark.parametrize(
    ("control", "made"),
    [
        ("random", lambda subspace, adapters: random_subspace(like=subspace, seed=3)),
        ("shuffled", lambda subspace, adapters: shuffled_subspace(subspace, seed=3)),
        ("mean_only", lambda subspace, adapters: mean_only_subspace(adapters, n_components=8, progress=False)),
    ],
)
@pytest.mark.parametrize("core", ["low_rank", "full"])
def test_another_subspace_of_the_same_size(adapters, subspace, control, made, core):
    config = EigenLoraConfig(subspace=subspace, r=4, lora_alpha=6, core=core, lora_dropout=0.1)
    found = control_config(config, control=control, collection=adapters, seed=3)
    assert found._subspace == made(subspace, adapters)
    assert (found.r, found.lora_alpha, found.core, found.lora_dropout) == (4, 6, core, 0.1)
    assert count(found) == count(config)
    assert config._subspace is subspace  # what it is made from stays as it is


def test_truncated_as_the_run_is(subspace):
    config = EigenLoraConfig(subspace=subspace, r=4, n_components=3)
    found = control_config(config, control="random")
    assert {bases.n_components for bases in found._subspace.values()} == {3}
    assert count(found) == count(config) == 4 * 2 * 3 * 4


def test_from_a_folder(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "subspace")
    found = control_config(EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=2), control="shuffled")
    assert found.subspace is None  # never saved: it is embedded in the adapter
    assert found._subspace == shuffled_subspace(subspace)


def test_lora_of_the_same_rank_in_the_same_places(subspace):
    config = EigenLoraConfig(
        subspace=subspace, r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only"
    )
    found = control_config(config, control="lora")
    assert type(found) is LoraConfig
    assert (found.r, found.lora_alpha, found.task_type, found.bias) == (4, 6, "CAUSAL_LM", "lora_only")
    assert sorted(found.target_modules) == [name for name in NAMES if "q_proj" in name]


def test_lora_of_as_many_parameters_on_the_last_modules(subspace):
    config = EigenLoraConfig(subspace=subspace, r=4)  # 4 modules of 2 x 8 x 4 = 64 coefficients
    found = control_config(config, control="same_parameters")
    assert count(config) == count(found) == 256
    small = control_config(EigenLoraConfig(subspace=subspace, r=1, n_components=8), control="same_parameters")
    assert (small.r, set(small.target_modules)) == (1, set(NAMES[2:]))  # 64 parameters pay for two modules
    one_layer = EigenLoraConfig(subspace=subspace, r=4, target_modules=["q_proj"], layers_to_transform=[0])
    assert count(one_layer) == count(control_config(one_layer, control="same_parameters")) == 64


def test_controls_learn(subspace, adapters):
    tokens = torch.arange(8)[None]
    for control in CONTROLS:
        config = control_config(EigenLoraConfig(subspace=subspace, r=2), control=control, collection=adapters)
        model = get_peft_model(tiny_llama(), config)
        start = model(tokens).logits.detach().clone()
        torch.testing.assert_close(start, tiny_llama()(tokens).logits)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            model(tokens).logits.square().mean().backward()
            optimizer.step()
        assert not torch.equal(model(tokens).logits, start), control


@pytest.mark.parametrize(
    ("settings", "control", "message"),
    [
        ({}, "nearest", "control='nearest' must be one of 'random', 'shuffled'"),
        ({}, "mean_only", "needs the adapters .*collection=; --adapters .* got None"),
        ({"init_from": "some-adapter"}, "lora", "a LoRA that starts at zero, but init_from='some-adapter'"),
        ({"rank_pattern": {"q_proj": 2}}, "same_parameters", "rank_pattern={'q_proj': 2}"),
        ({"target_modules": ["nothing"]}, "random", "names none of the subspace's 4 modules"),
    ],
)
def test_what_it_cannot_make(subspace, settings, control, message):
    with pytest.raises(AdapterConfigError, match=message):
        control_config(EigenLoraConfig(subspace=subspace, r=4, **settings), control=control)


@pytest.mark.parametrize(("r", "k"), [(1, 4), (4, 8), (16, 16)])
@pytest.mark.parametrize("core", ["low_rank", "full"])
def test_lora_has_as_many_parameters_as_it_can(r, k, core):
    model = tiny_llama()
    names = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
    bases = ModuleSubspace(
        torch.eye(k, 16),
        torch.eye(k, 16),
        singular_values_in=torch.ones(k),
        singular_values_out=torch.ones(k),
        explained_variance_ratio=torch.ones(k) / k,
    )
    subspace = PrincipalSubspace(dict.fromkeys(names, bases))
    budget = 4 * (2 * k * r if core == "low_rank" else k * k)
    if budget < 32:
        with pytest.raises(SubspaceError, match="does not pay for"):
            same_parameters_lora(subspace, r=r, core=core)
        return
    config = same_parameters_lora(subspace, r=r, core=core)
    count = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
    assert count <= budget
    step = 32 if budget < 4 * 32 else 4 * 32  # one more module, or one more rank on all
    assert count + step > budget


def test_unknown_core_is_refused():
    bases = ModuleSubspace(
        torch.eye(2, 4),
        torch.eye(2, 4),
        singular_values_in=torch.ones(2),
        singular_values_out=torch.ones(2),
        explained_variance_ratio=torch.ones(2) / 2,
    )
    with pytest.raises(SubspaceError, match="core='other'"):
        same_parameters_lora(PrincipalSubspace({"q": bases}), r=2, core="other")


def test_a_lora_of_as_many_parameters_lies_last_or_spread(subspace):
    with pytest.raises(SubspaceError, match="place='first' must be 'last' or 'spread'"):
        same_parameters_lora(subspace, r=2, place="first")
