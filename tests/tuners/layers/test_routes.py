"""The fast layer: the same numbers as the plain formula, wherever a training loop may put it."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import EigenLoraConfig
from eigenpeft.tuners.eigenlora.layer import EigenLinear
from eigenpeft.tuners.layers import routes
from eigenpeft.tuners.layers.routes import add_update, owns_output
from tests.processes import in_processes
from tests.tuners.conftest import logits, random_subspace, tiny_bert, tiny_gpt2, tiny_llama, train

CORES = ["low_rank", "full", "diagonal"]


def matrices(core="low_rank", *, n=9, m=11, k=5, r=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "components_in": normal(k, n),
        "coefficients_in": normal(r, k) if core == "low_rank" else None,
        "coefficients_out": {"low_rank": normal(k, r), "full": normal(k, k), "diagonal": normal(k)}[core],
        "components_out": normal(k, m),
    }


def moved(model, *, scale=0.3):
    """Coefficients away from their start, where the update is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(make=tiny_llama, suffixes=("q_proj", "v_proj"), **config):
    model = make()
    return moved(get_peft_model(model, EigenLoraConfig(subspace=random_subspace(model, suffixes), r=4, **config)))


def loss_and_gradients(model, tokens):
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def as_peft_would(model):
    """The same model with PEFT's own forward pass through the factor modules."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, EigenLinear):
            layer.__class__ = EigenLinear.__bases__[0]
    return model


@pytest.mark.parametrize("route", [routes.Route(*(bool(bits & 1 << i) for i in range(4))) for bits in range(16)])
def test_gradcheck_of_every_route(route, monkeypatch):
    monkeypatch.setattr(routes, "choose_route", lambda *_, **__: route)
    fixed = matrices()
    leaves = [torch.randn(2, 4, 11).double(), torch.randn(2, 4, 9).double()]
    leaves += [fixed.pop("coefficients_in"), fixed.pop("coefficients_out")]
    for leaf in leaves:
        leaf.requires_grad_()

    def update(y, x, in_side, out_side):
        return add_update(y, x, coefficients_in=in_side, coefficients_out=out_side, scaling=0.5, **fixed)

    assert torch.autograd.gradcheck(update, leaves)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_gradcheck_of_cores_without_a_rank(core):
    fixed = matrices(core)
    leaves = [torch.randn(4, 11).double(), torch.randn(4, 9).double(), fixed.pop("coefficients_out")]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, x, out_side: add_update(y, x, coefficients_out=out_side, **fixed), leaves)


def test_second_derivatives_are_refused_and_not_wrong():
    fixed = matrices()
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    fixed["coefficients_in"].requires_grad_()
    output = add_update(torch.zeros(4, 11).double(), x, **fixed)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("make", "suffixes"), [(tiny_llama, ("q_proj", "down_proj")), (tiny_gpt2, ("c_attn",))])
def test_the_layer_is_what_peft_computes_from_the_factors(make, suffixes, core, tokens):
    model = adapted(make, suffixes, core=core)
    assert any(type(layer) is EigenLinear for layer in model.modules())
    assert not any(type(layer) is EigenLinear for layer in as_peft_would(model).modules())
    for value, wanted in zip(
        loss_and_gradients(model, tokens), loss_and_gradients(as_peft_would(model), tokens), strict=True
    ):
        torch.testing.assert_close(value, wanted)


def test_dropout_is_the_same_with_the_same_seed(tokens):
    model = adapted(lora_dropout=0.5).train()
    results = []
    for each in (model, as_peft_would(model)):
        torch.manual_seed(5)
        results.append(loss_and_gradients(each, tokens))
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted)
    torch.manual_seed(6)
    assert not torch.equal(loss_and_gradients(model, tokens)[0], results[0][0])


def test_only_the_components_of_the_input_are_kept(tokens):
    layer = torch.nn.Linear(64, 48).requires_grad_(False)
    fixed = matrices(n=64, m=48, k=5, r=3, dtype=torch.float32)
    kept = []
    parameters = {value.data_ptr() for value in (*fixed.values(), layer.weight) if value is not None}
    fixed["coefficients_out"].requires_grad_()
    x = torch.randn(200, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        add_update(layer(x), x, **fixed)
    sizes = [tensor.numel() for tensor in kept if tensor.data_ptr() not in parameters]
    assert sizes == [200 * 5]


def test_no_gradient_is_computed_for_an_input_that_needs_none(monkeypatch):
    asked = []

    def spy(*args, needs_x, **kwargs):
        asked.append(needs_x)
        return original(*args, needs_x=needs_x, **kwargs)

    original = routes.low_rank_update_grad
    monkeypatch.setattr(routes, "low_rank_update_grad", spy)
    fixed = matrices()
    fixed["coefficients_out"].requires_grad_()
    for needs_x in (False, True):
        x = torch.randn(4, 9, dtype=torch.float64, requires_grad=needs_x)
        add_update(torch.zeros(4, 11).double(), x, **fixed).sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("core", CORES)
def test_autocast(tokens, core):
    model = adapted(core=core)
    exact = loss_and_gradients(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss_and_gradients(model, tokens)
        output = model(input_ids=tokens).logits
        reference = as_peft_would(model)(input_ids=tokens).logits
    assert output.dtype == reference.dtype == torch.bfloat16
    for value, wanted in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, atol=0.05, rtol=0.05)


def test_a_bfloat16_base_keeps_its_dtype_and_the_coefficients_theirs(tokens):
    model = tiny_llama().to(torch.bfloat16)
    model = moved(get_peft_model(model, EigenLoraConfig(subspace=random_subspace(model, ["q_proj"]), r=4)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for value, wanted in zip(
        loss_and_gradients(model, tokens), loss_and_gradients(as_peft_would(model), tokens), strict=True
    ):
        torch.testing.assert_close(value, wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tokens, reentrant):
    model = adapted().train()
    expected = loss_and_gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for value, wanted in zip(loss_and_gradients(model, tokens), expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("core", CORES)
def test_compiled_training_step_in_one_graph(tokens, core, no_shape_checks):
    model = adapted(core=core)
    expected = loss_and_gradients(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for value, wanted in zip(loss_and_gradients(compiled, tokens), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def distributed_data_parallel(rank, tokens, folder):
    expected = loss_and_gradients(adapted(), tokens)
    parallel = torch.nn.parallel.DistributedDataParallel(adapted())
    for value, wanted in zip(loss_and_gradients(parallel, tokens), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_distributed_data_parallel(tokens, tmp_path):
    in_processes(distributed_data_parallel, tokens, folder=tmp_path, n=1)


def test_per_example_gradients_of_torch_func(no_shape_checks):
    fixed = matrices(dtype=torch.float32)
    in_side, out_side = fixed.pop("coefficients_in"), fixed.pop("coefficients_out")
    x = torch.randn(6, 4, 9)

    def loss(out_side, x):
        y = add_update(torch.zeros(4, 11), x, coefficients_in=in_side, coefficients_out=out_side, **fixed)
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(out_side, x)
    expected = torch.stack([torch.func.grad(loss)(out_side, row) for row in x])
    torch.testing.assert_close(each, expected)


def test_inference_writes_over_the_base_output_only_when_nobody_has_seen_it(tokens):
    layer = torch.nn.Linear(9, 11)
    assert owns_output(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not owns_output(layer)
    handle.remove()
    assert not owns_output(torch.nn.Identity())
    model = adapted()
    expected = logits(as_peft_would(model), tokens)
    seen = []
    base_layer = next(layer for layer in model.modules() if isinstance(layer, EigenLinear)).base_layer
    base_layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    torch.testing.assert_close(logits(model, tokens), expected)
    torch.testing.assert_close(seen[0][1], torch.nn.functional.linear(seen[0][0], base_layer.weight))


def test_merge_unmerge_disable_copy_and_pickle(tokens, tmp_path):
    model = adapted()
    expected = logits(model, tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(type(layer) is EigenLinear for layer in other.modules())
        assert torch.equal(logits(other, tokens), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), logits(tiny_llama(), tokens), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, tokens), expected, atol=1e-4, rtol=1e-4)


def test_dora_goes_its_own_way(tokens):
    model = adapted(use_dora=True)
    expected = loss_and_gradients(as_peft_would(model), tokens)
    for value, wanted in zip(loss_and_gradients(model, tokens), expected, strict=True):
        assert torch.equal(value, wanted)


def test_two_active_adapters_add_up(tokens):
    model = adapted()
    config = model.peft_config["default"]
    model.add_adapter("second", EigenLoraConfig(subspace=config._subspace, r=2, core="full"))
    model.base_model.set_adapter(["default", "second"])
    moved(model)
    for value, wanted in zip(
        loss_and_gradients(model, tokens), loss_and_gradients(as_peft_would(model), tokens), strict=True
    ):
        torch.testing.assert_close(value, wanted)


def test_training_moves_as_peft_would(tokens):
    model = adapted(tiny_llama, ("q_proj",))
    reference = as_peft_would(model)
    torch.testing.assert_close(train(model, tokens, lr=0.1), train(reference, tokens, lr=0.1), atol=1e-5, rtol=1e-4)


def test_scaling_may_be_a_tensor(tokens):
    model = adapted()
    expected = logits(model, tokens)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])  # as PEFT's hot-swapping does
    torch.testing.assert_close(logits(model, tokens), expected)


def test_bert_classifier_trains(tokens):
    model = tiny_bert()
    subspace = random_subspace(model, ["query", "value"])
    model = get_peft_model(model, EigenLoraConfig(subspace=subspace, r=4, task_type="SEQ_CLS"))
    moved(model)
    labels = torch.tensor([0, 1, 2])
    for each in (model, as_peft_would(model)):
        each(input_ids=tokens, labels=labels).loss.backward()
        grads = [p.grad for p in each.parameters() if p.requires_grad]
        assert all(grad is not None and bool(grad.any()) for grad in grads)
