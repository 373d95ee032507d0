"""The gradient share against autograd's own dense gradients, on Linear, Conv1D and shared modules."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eigenpeft import PrincipalSubspace
from eigenpeft.audit import gradient_share
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg import orthonormal_rows
from eigenpeft.subspace import ModuleSubspace, random_subspace
from tests.factories import tiny_bert, tiny_gpt2, tiny_llama

CASES = {
    "bert": (tiny_bert, ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]),
    "gpt2": (tiny_gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
    "llama": (tiny_llama, ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]),
}


def shape(model, name):
    weight = model.get_submodule(name).weight
    return tuple(weight.shape) if isinstance(model.get_submodule(name), nn.Linear) else tuple(weight.shape)[::-1]


def made_subspace(model, names, *, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in names:
        m, n = shape(model, name)
        rows = [orthonormal_rows(torch.randn(k, width, generator=generator)) for width in (n, m)]
        spectrum = torch.ones(k)
        modules[name] = ModuleSubspace(
            *rows, singular_values_in=spectrum, singular_values_out=spectrum, explained_variance_ratio=spectrum / k
        )
    return PrincipalSubspace(modules)


def made_batches(kind, *, count=3):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 64, (3, 7), generator=generator)
        labels = torch.randint(0, 3, (3,), generator=generator) if kind == "bert" else ids
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def dense_gradient(model, name, batches):
    weight = model.get_submodule(name).weight
    total = sum(torch.autograd.grad(model(**batch).loss, weight)[0] for batch in batches)
    return total.double() if isinstance(model.get_submodule(name), nn.Linear) else total.double().mT


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_dense_gradients(kind, frozen):
    make, names = CASES[kind]
    model, batches = make(), made_batches(kind)
    subspace = made_subspace(model, names)
    gradients = {name: dense_gradient(model, name, batches) for name in names}
    model.requires_grad_(not frozen)
    found = gradient_share(model, batches=batches, subspace=subspace, seeds=(0, 1))
    inside = squared_norm = best = 0.0
    for row in found.modules:
        gradient, bases = gradients[row.module], subspace[row.module]
        core = bases.components_out.double() @ gradient @ bases.components_in.double().mT
        values = torch.linalg.svdvals(gradient).square()
        total = float(values.sum())
        assert row.squared_norm == pytest.approx(total, rel=1e-4)
        assert row.share == pytest.approx(float(core.square().sum()) / total, rel=1e-4)
        assert row.curve == pytest.approx([float(core[:k, :k].square().sum()) / total for k in (1, 2, 3, 4)], rel=1e-4)
        assert row.diagonal == pytest.approx(float(core.diagonal().square().sum()) / total, rel=1e-4)
        assert row.optimum == pytest.approx(float(values[:4].sum()) / total, rel=1e-4)
        control = random_subspace(like=subspace, seed=1)[row.module]
        other = control.components_out.double() @ gradient @ control.components_in.double().mT
        assert row.random[1] == pytest.approx(float(other.square().sum()) / total, rel=1e-4)
        inside, squared_norm, best = inside + row.share * total, squared_norm + total, best + row.optimum * total
    assert found.share == pytest.approx(inside / squared_norm)
    assert found.optimum == pytest.approx(best / squared_norm)
    assert found.n_batches == 3


def test_model_is_left_as_it_was():
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    gradient_share(model, batches=made_batches("bert"), subspace=made_subspace(model, CASES["bert"][1]))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_model_is_one_message():
    subspace = made_subspace(tiny_bert(), CASES["bert"][1])
    with pytest.raises(SubspaceError, match="None of the 2 modules of the subspace"):
        gradient_share(tiny_llama(), batches=made_batches("llama"), subspace=subspace)


def test_other_width_is_one_message():
    subspace = made_subspace(tiny_bert(), CASES["bert"][1])
    with pytest.raises(SubspaceError, match="maps 24 features to 32 in the model, 24 to 16"):
        gradient_share(tiny_bert(hidden_size=32), batches=made_batches("bert"), subspace=subspace)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = nn.ModuleDict({"q": nn.Linear(4, 3)})
        self.vision = nn.ModuleDict({"q": nn.Linear(4, 3)})

    def forward(self, x):
        return self.text["q"](x) + self.vision["q"](x)


def test_two_modules_that_fit_one_are_refused():
    subspace = made_subspace(nn.ModuleDict({"q": nn.Linear(4, 3)}), ["q"], k=2)
    with pytest.raises(SubspaceError, match=r"'text.q', 'vision.q' of the model all fit the subspace's module 'q'"):
        gradient_share(Towers(), batches=[torch.ones(2, 4)], subspace=subspace, loss=lambda model, x: model(x).sum())


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="transformers 5 renamed these modules")
def test_names_of_an_older_transformers_are_found():
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63))
    today = "model.language_model.layers.0.self_attn.q_proj"
    subspace = made_subspace(model, [today], k=2)
    old = PrincipalSubspace({"language_model.model.layers.0.self_attn.q_proj": subspace[today]})
    batches = made_batches("llama", count=1)
    found = gradient_share(model, batches=batches, subspace=old, seeds=())
    assert found.share == gradient_share(model, batches=batches, subspace=subspace, seeds=()).share > 0


def test_no_batch_is_one_message():
    model = tiny_bert()
    with pytest.raises(SubspaceError, match="in 0 batches"):
        gradient_share(model, batches=[], subspace=made_subspace(model, CASES["bert"][1]))


def test_curves_count_every_module_and_end_at_the_shares():
    model, names = tiny_bert(), CASES["bert"][1]
    modules = dict(made_subspace(model, names).items())
    modules[names[0]] = modules[names[0]].truncate(2)  # K = 3 and 4 keep what its two reach
    found = gradient_share(model, batches=made_batches("bert"), subspace=PrincipalSubspace(modules), seeds=(0, 1, 2))
    total = sum(row.squared_norm for row in found.modules)
    for k, value in enumerate(found.curve):
        assert value * total == pytest.approx(
            sum(row.squared_norm * row.curve[min(k, len(row.curve) - 1)] for row in found.modules)
        )
    assert {row.module: len(row.curve) for row in found.modules} == {names[0]: 2, names[1]: 4}
    assert found.curve[-1] == found.share
    assert found.optimum_curve[-1] == found.optimum
    assert found.random_curve[-1] == pytest.approx(sum(found.random) / 3)
    assert (
        gradient_share(model, batches=made_batches("bert"), subspace=PrincipalSubspace(modules), seeds=()).random_curve
        == ()
    )
