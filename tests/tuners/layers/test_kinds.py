"""Both methods on every kind of layer that LoRA adapts: start, training, folding, saving, exact unmerge."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft import EigenLoraConfig, MosLoraConfig, PrincipalSubspace, export_lora
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import ModuleSubspace, SubspaceInfo
from tests.peft_suite.random_subspaces import random_subspace


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.target = nn.Embedding(20, 12)

    def forward(self, x):
        return self.target(x)


class Experts(nn.Module):
    """Three experts in one parameter, as mixtures keep them: (experts, out_features, in_features)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 8) / 3)

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.weight, x)


class Around(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x):
        return self.target(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.target = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.target(x, x, x, need_weights=False)[0]


# Kind: (model, shape of the input or number of tokens, settings of the config).
KINDS = {
    "linear": (lambda: Around(nn.Linear(12, 10)), (5, 12), {}),
    "embedding": (Embedded, 20, {}),
    "conv1d": (lambda: Around(nn.Conv1d(6, 8, 3, stride=2, padding=1)), (2, 6, 11), {}),
    "conv2d": (lambda: Around(nn.Conv2d(4, 8, (3, 2))), (2, 4, 7, 6), {}),
    "conv2d 1x1": (lambda: Around(nn.Conv2d(6, 8, 1)), (2, 6, 5, 5), {}),
    "conv3d": (lambda: Around(nn.Conv3d(3, 8, 2)), (2, 3, 4, 4, 4), {}),
    "grouped": (lambda: Around(nn.Conv2d(4, 8, 3, groups=2)), (2, 4, 6, 6), {}),
    "experts": (lambda: Around(Experts()), (5, 8), {"target_modules": [], "target_parameters": ["target.weight"]}),
    "attention": (Attention, (2, 5, 8), {}),
}
METHODS = ("moslora", "low_rank", "full", "diagonal")
UNDEFINED = {("grouped", "diagonal")}
UNMERGEABLE = {"grouped"}  # by LoRA itself


def adapted(kind, method, *, init=True, **more):
    make, shape, settings = KINDS[kind]
    torch.manual_seed(0)
    base = make().eval()
    x = torch.arange(shape).view(2, -1) if isinstance(shape, int) else torch.randn(shape)
    config = config_for(base, method, settings=settings, init_lora_weights=init, **more)
    return base, x, get_peft_model(copy.deepcopy(base), config).eval()


def config_for(base, method, *, settings, **more):
    common = {"r": 4, "lora_alpha": 8, "target_modules": ["target"]} | settings | more
    if method == "moslora":
        return MosLoraConfig(**common)
    subspace = random_subspace(base, parameters="target_parameters" in settings)
    return EigenLoraConfig(subspace=subspace, core=method, **common)


CASES = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) not in UNDEFINED]


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_starts_at_the_base_and_every_trained_tensor_learns(kind, method):
    base, x, model = adapted(kind, method)
    torch.testing.assert_close(model(x), base(x), atol=1e-6, rtol=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    target = base(x).detach() + torch.randn_like(base(x))
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    before = {name: p.detach().clone() for name, p in trained.items()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_saves_and_loads(kind, method, tmp_path):
    base, x, model = adapted(kind, method, init=False)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    # PEFT's attention merges and unmerges at every forward pass, which rounds.
    tolerance = {"atol": 1e-6 if kind == "attention" else 0.0, "rtol": 0.0}
    for settings in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **settings).eval()
        torch.testing.assert_close(loaded(x), expected, **tolerance)


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_exports_as_plain_lora(kind, method, tmp_path):
    base, x, model = adapted(kind, method, init=False)
    expected = model(x)
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    assert not any("coefficients" in name or "mixer" in name for name in plain.state_dict())
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_exports_the_nearest_update_of_a_smaller_rank(kind, tmp_path):
    base, _, model = adapted(kind, "full", init=False)
    export_lora(model, tmp_path, rank=2)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ours, theirs = (each.base_model.model.target.get_delta_weight("default").detach() for each in (model, plain))
    ours, theirs = (update.flatten(1).double() for update in (ours, theirs))
    best = torch.linalg.svdvals(ours)[2:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(ours - theirs), best, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("kind", "what"), [("grouped", "2 groups"), ("experts", "3 experts")])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_blocks_are_not_truncated(kind, what, tmp_path):
    with pytest.raises(AdapterConfigError, match=f"rank=2: .*{what}"):
        export_lora(adapted(kind, "moslora", init=False)[2], tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "method"), [c for c in CASES if c[0] not in ("experts", "attention")])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_dora_saves_and_loads(kind, method, tmp_path):
    base, x, model = adapted(kind, method, init=False, use_dora=True)
    assert torch.equal(model(x), expected := model(x))
    model.save_pretrained(tmp_path)
    for settings in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **settings).eval()
        torch.testing.assert_close(loaded(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "method"), [case for case in CASES if case[0] not in UNMERGEABLE])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.filterwarnings("ignore:All adapters are already merged")  # PEFT's attention, of its output projection
@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_folds_exactly_and_merges(kind, method, safe_merge):
    _, x, model = adapted(kind, method, init=False)
    expected = model(x)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(merged(x), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "method"), [c for c in CASES if c[0] not in UNMERGEABLE | {"attention"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_unmerging_restores_the_base_bit_for_bit(kind, method, dtype, safe_merge):
    make, _, settings = KINDS[kind]
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, config_for(base.float(), method, settings=settings, init_lora_weights=False))
    model.to(dtype)
    for _ in range(3):
        model.merge_adapter(safe_merge=safe_merge)
        model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_unmerging_keeps_what_somebody_else_wrote_meanwhile():
    _, _, model = adapted("linear", "moslora", init=False)
    weight = model.base_model.model.target.base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter()
    weight.data += 1
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before + 1)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolution_refuses_a_diagonal_core():
    with pytest.raises(
        AdapterConfigError, match="core='diagonal' is not defined for 'target', a convolution with 2 groups"
    ):
        adapted("grouped", "diagonal")


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_must_divide_the_inner_channels():
    torch.manual_seed(0)
    base = Around(nn.Conv2d(4, 8, 3, groups=2))
    sides = [torch.linalg.qr(torch.randn(width, 3))[0].mT.contiguous() for width in (36, 8)]
    spectrum = torch.ones(3)
    subspace = PrincipalSubspace(
        {
            "target": ModuleSubspace(
                *sides, singular_values_in=spectrum, singular_values_out=spectrum, explained_variance_ratio=spectrum / 3
            )
        },
        info=SubspaceInfo(),
    )
    config = EigenLoraConfig(subspace=subspace, r=4, target_modules=["target"], core="full")
    with pytest.raises(AdapterConfigError, match="has 3 inner channels for 'target', a convolution with 2 groups"):
        get_peft_model(base, config)


def test_a_convolution_of_another_kernel_is_refused():
    subspace = random_subspace(Around(nn.Conv2d(4, 8, 3)), parameters=False)
    with pytest.raises(AdapterConfigError, match="'target' is 8 x 16 in the model and 8 x 36 in the subspace"):
        get_peft_model(Around(nn.Conv2d(4, 8, 2)), EigenLoraConfig(subspace=subspace, r=4, target_modules=["target"]))


@pytest.mark.parametrize("method", METHODS)
def test_experts_have_updates_of_their_own(method):
    base, _, model = adapted("experts", method, init=False)
    layer = model.base_model.model.target
    update = layer.get_delta_weight("default")
    assert update.shape == (3, 6, 8)
    ranks = torch.linalg.matrix_rank(update)
    assert (ranks <= 6).all()
    assert not torch.allclose(update[0], update[1], atol=1e-4)
    assert torch.equal(base.target.weight, layer.get_base_layer().weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_adapted_as_its_module_is(method):
    torch.manual_seed(0)
    base, x = Around(nn.Linear(12, 10)), torch.randn(5, 12)
    bases = random_subspace(base, parameters=False)["target"]
    subspace = PrincipalSubspace({"target": bases, "target.weight": bases}, info=SubspaceInfo())
    common = {"r": 4, "init_lora_weights": False}
    by_module, by_parameter = (
        {"target_modules": ["target"]},
        {"target_modules": [], "target_parameters": ["target.weight"]},
    )
    models = []
    for settings in (by_module, by_parameter):
        config = (
            MosLoraConfig(**common, **settings)
            if method == "moslora"
            else EigenLoraConfig(subspace=subspace, core=method, **common, **settings)
        )
        models.append(get_peft_model(copy.deepcopy(base), config).eval())
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trained[0].keys() == trained[1].keys()
    with torch.no_grad():
        for name, parameter in trained[1].items():
            parameter.copy_(trained[0][name])
    torch.testing.assert_close(models[1](x), models[0](x), atol=1e-5, rtol=1e-5)
    assert (models[0](x) - base(x)).abs().max() > 1e-3


def test_moslora_update_of_experts_is_the_formula():
    _, _, model = adapted("experts", "moslora", init=False)
    layer = model.base_model.model.target
    A, B = layer.lora_A["default"].weight.view(3, 4, 8), layer.lora_B["default"].factor.view(6, 4, 3)
    for expert, mixer in enumerate(layer.lora_B["default"].mixer):
        expected = 2 * B[:, :, expert].double() @ mixer.double() @ A[expert].double()
        torch.testing.assert_close(layer.get_delta_weight("default")[expert].double(), expected, atol=1e-6, rtol=1e-5)


def test_moslora_update_of_an_embedding_is_the_formula():
    _, _, model = adapted("embedding", "moslora", init=False)
    layer = model.base_model.model.target
    factor = layer.lora_embedding_B["default"]
    expected = 2 * factor.factor.double() @ factor.mixer.double() @ layer.lora_embedding_A["default"].double()
    torch.testing.assert_close(layer.get_delta_weight("default").double(), expected.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_on_experts(method):
    base, x, model = adapted("experts", method, init=False)
    first = model(x)
    config = config_for(base, method, settings=KINDS["experts"][2], init_lora_weights=False, r=2)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert (model(x) - first).abs().max() > 1e-4
    model.set_adapter("default")
    assert torch.equal(model(x), first)
