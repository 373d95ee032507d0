"""Mixtures: trained weights over the frozen cores of a store's members."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, SubspaceBuilder, export_lora
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.tuners import control_config
from eigenpeft.tuners.eigenlora.bases import find_bases
from eigenpeft.tuners.parameter_groups import parameter_groups
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

RANKS = {"first": 4, "second": 2, "third": 3}
MODULES = {"first": ["q_proj", "v_proj"], "second": ["q_proj", "v_proj"], "third": ["q_proj"]}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Three LoRA adapters, one of which adapts fewer modules, and a store whose bases hold them whole."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, rank in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=2, target_modules=MODULES[name], init_lora_weights=False)
        config.task_type = "CAUSAL_LM"
        base = tiny_llama()
        torch.manual_seed(rank)
        get_peft_model(base, config).save_pretrained(folder / "adapters" / name)
    adapters = AdapterCollection.from_pretrained(folder / "adapters")
    subspace = SubspaceBuilder().fit(adapters).subspace_
    AdapterStore.from_collection(subspace, adapters).save_pretrained(folder / "store")
    return folder


def mixture(zoo, base=None, **settings):
    config = EigenLoraConfig(core="mixture", task_type="CAUSAL_LM", **{"sources": str(zoo / "store")} | settings)
    return get_peft_model(tiny_llama() if base is None else base, config).eval()


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("weights", ["adapter", "module"])
@pytest.mark.parametrize("name", RANKS)
def test_a_weight_of_one_is_that_adapter_exactly(zoo, weights, name, tokens):
    model = mixture(zoo, weights=weights, init_weights=[float(each == name) for each in RANKS])
    expected = logits(PeftModel.from_pretrained(tiny_llama(), zoo / "adapters" / name).eval(), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("weights", "count"), [("adapter", 3), ("module", 3 * 4)])
def test_it_trains_one_number_per_source_or_per_source_and_module(zoo, weights, count):
    trained = trained_parameters(mixture(zoo, weights=weights))
    assert sum(parameter.numel() for parameter in trained) == count
    assert all(torch.equal(parameter, torch.full((3,), 1 / 3)) for parameter in trained)  # the mean


def test_opening_writes_nothing_to_the_config_and_making_a_model_writes_what_its_file_must_say(zoo):
    config = EigenLoraConfig(core="mixture", sources=str(zoo / "store"), task_type="CAUSAL_LM")
    before = dict(vars(config))
    opened = find_bases(**config.named_bases)
    assert vars(config) == before
    assert opened.subspace is opened.sources.subspace
    assert config.subspace_sha256 is config.source_names is None
    get_peft_model(tiny_llama(), config)
    assert config.subspace_sha256 == opened.subspace.fingerprint
    assert config.source_names == list(RANKS)


def dense_loss(zoo, tokens, weights):
    """The loss with Σ w_t ΔW_t in the base's own weights, in float64, as a function of the weights of each module."""
    store, base = AdapterStore.from_pretrained(zoo / "store"), tiny_llama().double()
    parameters = dict(base.named_parameters())
    for module, own in weights.items():
        update = torch.zeros_like(parameters[f"{module}.weight"])
        for weight, name in zip(own, RANKS, strict=True):
            factors = store.factors(name, module=module)
            if factors is not None:
                update = update + weight * (factors[0].double() @ factors[1].double())
        parameters[f"{module}.weight"] = parameters[f"{module}.weight"] + update
    return functional_call(base, parameters, kwargs={"input_ids": tokens, "labels": tokens}).loss


@pytest.mark.parametrize("kind", ["adapter", "module"])
def test_the_gradient_is_that_of_the_dense_sum(zoo, kind, tokens):
    start = [0.3, -0.5, 0.8]
    model = mixture(zoo, base=tiny_llama().double(), weights=kind, init_weights=start).double()
    model(input_ids=tokens, labels=tokens).loss.backward()
    modules = AdapterStore.from_pretrained(zoo / "store").subspace.modules
    shared = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    weights = {name: shared if kind == "adapter" else shared.detach().clone().requires_grad_() for name in modules}
    dense_loss(zoo, tokens, weights).backward()
    layers = dict(model.get_base_model().named_modules())
    for name in modules:
        found = layers[name].lora_B["default"].weights.grad
        torch.testing.assert_close(found, weights[name].grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weights", ["adapter", "module"])
def test_saved_loaded_merged_exported_and_stored(zoo, weights, tokens, tmp_path):
    model = mixture(zoo, weights=weights)
    at_start, count = logits(model, tokens), len(trained_parameters(model))
    expected = train(model, tokens)
    assert (expected - at_start).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["source_names"] == list(RANKS)
    assert saved["sources"] is saved["init_weights"] is None
    for low in (False, True):
        again = PeftModel.from_pretrained(
            tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=low, is_trainable=True
        ).eval()
        assert torch.equal(logits(again, tokens), expected)
        assert len(trained_parameters(again)) == count  # weights of the whole model are still one
    assert len(trained_parameters(copy.deepcopy(model))) == count
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-5, atol=1e-5)
    store = AdapterStore(AdapterStore.from_pretrained(zoo / "store").subspace)
    assert store.add(model, name="mine").kinds == ("mixture",)
    export_lora(store, tmp_path / "stored", adapter_name="mine")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "stored").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-5, atol=1e-5)


def test_needs_no_store_once_it_is_saved(zoo, tokens, tmp_path):
    store = AdapterStore.from_pretrained(zoo / "store")
    memory = AdapterStore(store.subspace.truncate(5), members={name: cut(store[name]) for name in RANKS})
    model = mixture(zoo, sources=memory)
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")  # bases of a store in memory are embedded
    del memory, model
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, tokens), expected)


def cut(member):
    """A member in the first five components."""
    cores = {name: Core("full", {"coefficients_out": core.dense()[:5, :5].clone()}) for name, core in member.items()}
    return AdapterMember(cores)


@pytest.mark.parametrize(("core", "r"), [("low_rank", 2), ("full", 2), ("low_rank", 9)])
def test_mixture_first_then_on(zoo, core, r, tokens, tmp_path):
    model = mixture(zoo, weights="module")
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "mixture")
    config = EigenLoraConfig(
        subspace=str(zoo / "store"), core=core, r=r, init_from=str(tmp_path / "mixture"), task_type="CAUSAL_LM"
    )
    on = get_peft_model(tiny_llama(), config).eval()
    torch.testing.assert_close(logits(on, tokens), expected, rtol=1e-5, atol=1e-5)
    assert (config.offset_ranks is not None) == (core == "low_rank" and r == 2)
    after = train(on, tokens)
    on.save_pretrained(tmp_path / "on")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "on").eval(), tokens), after)


def test_some_of_the_members_in_another_order(zoo, tokens):
    model = mixture(zoo, source_names=["third", "first"], init_weights=[0.0, 1.0])
    expected = logits(PeftModel.from_pretrained(tiny_llama(), zoo / "adapters" / "first").eval(), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "tsv"])
def test_combinations_of_mixtures_are_those_of_their_cores(zoo, combination):
    model = mixture(zoo, init_weights=[0.5, 0.2, -1.0])
    other = EigenLoraConfig(core="mixture", sources=str(zoo / "store"), init_weights=[0.1, 0.7, 0.3])
    model.add_adapter("other", other)
    options = {"density": 0.5} if combination == "ties" else {}
    model.add_weighted_adapter(["default", "other"], [1.0, -2.0], "sum", combination_type=combination, **options)
    assert model.peft_config["sum"].core == "full"
    if combination in ("linear", "cat", "svd"):
        for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
            expected = layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-6)


def test_lora_alpha_has_no_meaning(zoo, caplog):
    with caplog.at_level("INFO"):
        config = EigenLoraConfig(core="mixture", sources=str(zoo / "store"), r=16, lora_alpha=32, use_rslora=True)
    assert "no scaling beside its weights: lora_alpha, use_rslora is not used" in caplog.text
    layers = get_peft_model(tiny_llama(), config).modules()
    assert {layer.scaling["default"] for layer in layers if isinstance(layer, LoraLayer)} == {1.0}


def test_weights_get_the_rate_of_coefficients(zoo):
    groups = parameter_groups(mixture(zoo), learning_rate=1e-3, coefficients_learning_rate=0.1)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [("coefficients", 0.1, 1)]


def test_cores_that_are_missing_or_altered_are_refused(zoo, tmp_path):
    mixture(zoo).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".cores"))
    for changed, message in (
        ({name: value for name, value in tensors.items() if name != key}, r"lacks '.*lora_B\.cores'"),
        (tensors | {key: tensors[key][:2].clone()}, r"lora_B\.cores' of shape \(2, "),
        (tensors | {key: tensors[key] * float("inf")}, r"finite numbers are expected: it was altered"),
    ):
        save_file(changed, path)
        with pytest.raises(AdapterConfigError, match=message):
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_refusals(zoo):
    for settings, message in (
        ({"sources": None}, r"pass sources=, an AdapterStore or its folder"),
        ({"sources": str(zoo / "adapters")}, r"are adapters and no store: put them into one"),
        ({"source_names": ["first", "nobody"]}, r"the store has 3 adapters, 'first', .* and not 'nobody'"),
        ({"source_names": "first"}, r"source_names='first' must be a list of names"),
        ({"init_weights": [1.0]}, r"init_weights has 1 numbers for 3 sources"),
        ({"init_weights": [1.0, "a", 0.0]}, r"init_weights=.* must be a finite number, a list of them, or None"),
        ({"weights": "layer"}, r"weights='layer' must be one of 'adapter', 'module'"),
        ({"init_from": "x"}, r"a mixture starts from its sources, with the weights init_weights"),
        ({"subspace": random_subspace(tiny_llama(), ["q_proj"])}, r"The bases of the sources have fingerprint"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            if settings == {"sources": None}:
                settings = settings | {"subspace": str(zoo / "store")}
            mixture(zoo, **settings)


def test_an_open_store_without_members_is_refused_as_what_it_is(zoo):
    empty = AdapterStore(AdapterStore.from_pretrained(zoo / "store").subspace)
    with pytest.raises(AdapterConfigError, match=r"source_names=\[\]: the store has 0 adapters, none"):
        mixture(zoo, sources=empty)


def test_members_on_paired_directions_are_mixed_too(zoo, tokens):
    adapters = AdapterCollection.from_pretrained([zoo / "adapters" / "first", zoo / "adapters" / "second"])
    store = AdapterStore.from_collection(SubspaceBuilder(3, method="paired").fit(adapters).subspace_, adapters)
    model = mixture(zoo, sources=store, init_weights=[1.0, -2.0])
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            pairs = [store.factors(member, module=name) for member in store.names]
            expected = pairs[0][0] @ pairs[0][1] - 2 * pairs[1][0] @ pairs[1][1]
            torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_cores_keep_their_precision_on_a_base_of_16_bits(zoo, dtype, tokens, tmp_path):
    model = mixture(zoo, base=tiny_llama().to(dtype))
    model.save_pretrained(tmp_path / "mixture")
    store = AdapterStore.from_pretrained(zoo / "store")
    saved = {name: tensor for name, tensor in load_file(tmp_path / "mixture" / "adapter_model.safetensors").items()}
    for module in store.subspace:
        assert torch.equal(saved[f"base_model.model.{module}.lora_B.cores"], store.cores(module))
    again = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path / "mixture").eval()
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    config = EigenLoraConfig(subspace=str(zoo / "store"), r=2, init_from="mean", init_adapters=str(zoo / "adapters"))
    started = get_peft_model(tiny_llama().to(dtype), config)
    offsets = {name: buffer for name, buffer in started.named_buffers() if name.endswith(".offset")}
    assert offsets
    assert all(buffer.dtype == torch.float32 for buffer in offsets.values())
    assert logits(started, tokens).dtype == dtype


def test_controls_of_a_mixture(zoo):
    config = EigenLoraConfig(core="mixture", sources=str(zoo / "store"), r=3)
    assert control_config(config, control="lora").r == 3
    for control in ("random", "shuffled", "mean_only", "same_parameters"):
        with pytest.raises(
            AdapterConfigError, match=rf"control='{control}' is of a subspace, and core='mixture' weighs"
        ):
            control_config(config, control=control)
