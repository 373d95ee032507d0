"""Warm starts: the new adapter begins at the old one's projection, whatever the core, rank and scaling."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, SubspaceBuilder, export_lora
from eigenpeft.errors import AdapterConfigError, CollectionError
from tests.factories import random_factors, tiny_bert, write_adapter
from tests.peft_suite.random_subspaces import random_subspace as whole_subspace
from tests.tuners.conftest import is_conv1d, random_subspace, tiny_gpt2, tiny_llama, train
from tests.tuners.layers.test_kinds import KINDS


@pytest.fixture
def trained(architecture, tokens, tmp_path):
    """Two trained LoRA adapters of ranks 4 and 2 on disk, and the subspace that holds both of them whole."""
    for name, rank in (("first", 4), ("second", 2)):
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(architecture[1]), task_type="CAUSAL_LM")
        config.fan_in_fan_out = is_conv1d(architecture)
        model = get_peft_model(architecture[0](), config)
        train(model, tokens, lr=0.1)
        model.save_pretrained(tmp_path / name)
    collection = AdapterCollection.from_pretrained([tmp_path / "first", tmp_path / "second"])
    subspace = SubspaceBuilder(6).fit(collection).subspace_
    subspace.save_pretrained(tmp_path / "subspace")
    AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
    return tmp_path


def updates(model):
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def load(architecture, folder):
    return PeftModel.from_pretrained(architecture[0](), folder)


@pytest.mark.parametrize(("core", "r"), [("low_rank", 4), ("low_rank", 7), ("full", 4)])
@pytest.mark.parametrize("source", ["first", "store#first"])
def test_starts_where_the_adapter_is(architecture, trained, core, r, source):
    config = EigenLoraConfig(
        subspace=str(trained / "subspace"),
        r=r,
        lora_alpha=10,
        core=core,
        task_type="CAUSAL_LM",
        init_from=str(trained / source),
    )
    model = get_peft_model(architecture[0](), config)
    for name, update in updates(load(architecture, trained / "first")).items():
        torch.testing.assert_close(updates(model)[name], update, rtol=1e-4, atol=1e-5)
    model.save_pretrained(trained / "warm")
    assert (
        json.loads((trained / "warm" / "adapter_config.json").read_text())["init_from"] is None
    )  # reloading needs none


def test_a_config_starts_every_model_that_it_is_used_for(architecture, trained):
    config = EigenLoraConfig(subspace=str(trained / "subspace"), r=4, init_from=str(trained / "first"))
    first, second = (updates(get_peft_model(architecture[0](), config)) for _ in range(2))
    assert all(update.any() for update in first.values())
    assert all(torch.equal(update, first[name]) for name, update in second.items())


def test_a_smaller_rank_starts_at_the_best_approximation(architecture, trained):
    config = EigenLoraConfig(subspace=str(trained / "subspace"), r=2, init_from=str(trained / "first"))
    started = updates(get_peft_model(architecture[0](), config))
    for name, update in updates(load(architecture, trained / "first")).items():
        values = torch.linalg.svdvals(update.double())
        least = values[2:].square().sum().sqrt()
        error = (update - started[name]).double().norm()
        assert error <= least * (1 + 1e-3) + 1e-6 * values[0]


def test_a_diagonal_core_starts_at_the_diagonal(architecture, trained):
    subspace = str(trained / "subspace")
    mixer = get_peft_model(
        architecture[0](), EigenLoraConfig(subspace=subspace, r=4, core="full", init_from=str(trained / "first"))
    )
    diagonal = get_peft_model(
        architecture[0](), EigenLoraConfig(subspace=subspace, r=4, core="diagonal", init_from=str(trained / "first"))
    )
    by_name = dict(diagonal.named_modules())
    for name, layer in mixer.named_modules():
        if isinstance(layer, LoraLayer):
            whole = layer.lora_B["default"].coefficients
            torch.testing.assert_close(by_name[name].lora_B["default"].coefficients, whole.diagonal())


def test_sources_that_cannot_serve(architecture, trained):
    foreign = random_subspace(architecture[0](), architecture[1], n_components=5, seed=9)
    for source, subspace, error, message in (
        ("store#first", foreign, AdapterConfigError, "fingerprint"),
        ("store#nobody", str(trained / "subspace"), Exception, "nobody"),
        ("nowhere", str(trained / "subspace"), CollectionError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            get_peft_model(architecture[0](), EigenLoraConfig(subspace=subspace, r=4, init_from=str(trained / source)))


def test_an_adapter_of_other_modules_is_refused(tmp_path, tokens):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["o_proj"]))
    train(model, tokens)
    model.save_pretrained(tmp_path / "other")
    subspace = random_subspace(tiny_gpt2(), ["c_attn"])
    with pytest.raises(AdapterConfigError, match="2 of the 2 adapted modules are not in the subspace"):
        get_peft_model(tiny_gpt2(), EigenLoraConfig(subspace=subspace, r=2, init_from=str(tmp_path / "other")))


@pytest.fixture
def embedded(tmp_path, tokens):
    """Two trained adapters of an embedding and a linear layer, and everything made from them."""
    for name, rank in (("first", 4), ("second", 2)):
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["embed_tokens", "q_proj"])
        model = get_peft_model(tiny_llama(), config)
        train(model, tokens, lr=0.1)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    with AdapterCollection.from_pretrained([tmp_path / "first", tmp_path / "second"], embeddings=True) as collection:
        subspace = SubspaceBuilder(6).fit(collection).subspace_
        subspace.save_pretrained(tmp_path / "subspace")
        AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
    return tmp_path


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(("core", "r"), [("low_rank", 4), ("low_rank", 6), ("full", 4)])
@pytest.mark.parametrize("source", ["first", "store#first"])
def test_embeddings_start_where_the_adapter_is(embedded, tokens, core, r, source):
    folder = embedded / "subspace"
    config = EigenLoraConfig(subspace=str(folder), r=r, core=core, init_from=str(embedded / source))
    model = get_peft_model(tiny_llama(), config)
    expected = updates(PeftModel.from_pretrained(tiny_llama(), embedded / "first"))
    started = updates(model)
    assert started.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(started[name], update, rtol=1e-4, atol=1e-5)
    # Ranks that the adapter leaves free can still learn: not both of their sides are zero.
    layer = model.base_model.model.model.embed_tokens
    if core == "low_rank":
        inside = layer.lora_embedding_A["default"].coefficients
        outside = layer.lora_embedding_B["default"].coefficients
        assert (inside.abs().sum(dim=1) + outside.abs().sum(dim=0) > 0).all()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_store_with_embeddings_exports_plain_lora(embedded):
    export_lora(AdapterStore.from_pretrained(embedded / "store"), embedded / "plain", adapter_name="first")
    exported = updates(PeftModel.from_pretrained(tiny_llama(), embedded / "plain"))
    for name, update in updates(PeftModel.from_pretrained(tiny_llama(), embedded / "first")).items():
        torch.testing.assert_close(exported[name], update, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(("kind", "what"), [("grouped", "2 groups"), ("experts", "3 experts")])
def test_layers_with_many_updates_take_no_warm_start(kind, what, tmp_path):
    make, _, settings = KINDS[kind]
    base = make()
    subspace = whole_subspace(base, parameters="target_parameters" in settings)
    (module,) = (name for name in subspace if name.startswith("target"))
    linear = torch.nn.Linear(subspace[module].in_features, subspace[module].out_features)
    plain = torch.nn.ModuleDict({"target": torch.nn.ModuleDict({"weight": linear}) if "." in module else linear})
    get_peft_model(plain, LoraConfig(r=2, target_modules=[module])).save_pretrained(tmp_path)
    common = {"r": 4, "target_modules": ["target"]} | settings
    config = EigenLoraConfig(subspace=subspace, init_from=str(tmp_path), **common)
    with pytest.raises(AdapterConfigError, match=f"is one update for '{module}', which has {what}"):
        get_peft_model(base, config)


def test_what_a_warm_start_leaves_out_is_named(tokens, tmp_path):
    options = {"r": 2, "task_type": "CAUSAL_LM"}
    wide = LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], modules_to_save=["lm_head"], **options)
    model = get_peft_model(tiny_llama(), wide)
    train(model, tokens, steps=1)
    model.save_pretrained(tmp_path / "wide")
    subspace = random_subspace(tiny_llama(), ["q_proj", "v_proj"])
    config = EigenLoraConfig(subspace=subspace, init_from=str(tmp_path / "wide"), target_modules=["q_proj"], **options)
    with pytest.warns(UserWarning, match="starts without") as caught:
        get_peft_model(tiny_llama(), config)
    said = next(str(warning.message) for warning in caught if "starts without" in str(warning.message))
    assert "2 modules that are not in the subspace (use one that has them): 'model.layers.0.self_attn.o_proj'" in said
    assert (
        "2 modules that the new adapter does not adapt (name them in target_modules): 'model.layers.0.self_attn.v_proj'"
        in said
    )
    assert (
        "1 tensors that are not updates of weights (heads, biases or tokens; name a head in modules_to_save): "
        "'base_model.model.lm_head.weight'"
    ) in said


def test_a_whole_warm_start_says_nothing(architecture, trained, recwarn):
    config = EigenLoraConfig(subspace=str(trained / "subspace"), r=4, init_from=str(trained / "first"))
    get_peft_model(architecture[0](), config)
    assert not any("starts without" in str(warning.message) for warning in recwarn)


def test_two_modules_of_an_adapter_that_fit_one_basis_are_refused(tmp_path):
    factors = random_factors(modules={"text.layers.0.q": (8, 8), "vision.layers.0.q": (8, 8)}, rank=2)
    write_adapter(tmp_path / "towers", factors)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})])})
    config = EigenLoraConfig(
        subspace=random_subspace(model, ["q"], n_components=4), r=2, init_from=str(tmp_path / "towers")
    )
    with pytest.raises(
        AdapterConfigError, match=r"'text.layers.0.q', 'vision.layers.0.q', which all fit the subspace's one"
    ):
        get_peft_model(model, config)


@pytest.fixture
def classifier(tmp_path):
    """A subspace, and the folder and store member of one trained classifier in it, with its logits."""
    subspace = random_subspace(tiny_bert(), ("query", "value"), n_components=6)
    subspace.save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=3, lora_alpha=7, core="full", task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    store = AdapterStore(subspace)
    store.add(model, name="one")
    store.save_pretrained(tmp_path / "store")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model(torch.arange(1, 13)[None]).logits


@pytest.mark.parametrize("source", ["adapter", "store#one"])
@pytest.mark.parametrize("lora_alpha", [7, 5])
def test_a_classifier_starts_with_its_head(classifier, source, lora_alpha):
    folder, expected = classifier
    options = {"subspace": str(folder / "subspace"), "r": 3, "lora_alpha": lora_alpha, "core": "full"}
    config = EigenLoraConfig(**options, task_type="SEQ_CLS", init_from=str(folder / source))
    model = get_peft_model(tiny_bert(), config).eval()
    torch.testing.assert_close(model(torch.arange(1, 13)[None]).logits, expected, atol=1e-6, rtol=0)
    with model.disable_adapter():
        base = model(torch.arange(1, 13)[None]).logits
    torch.testing.assert_close(base, tiny_bert()(torch.arange(1, 13)[None]).logits)


def test_a_head_of_another_width_starts_afresh_and_is_named(classifier):
    folder, _ = classifier
    options = {"subspace": str(folder / "subspace"), "r": 3, "core": "full", "task_type": "SEQ_CLS"}
    config = EigenLoraConfig(**options, init_from=str(folder / "store#one"))
    with pytest.warns(
        UserWarning, match=r"2 tensors that are not updates of weights .*: 'base_model\.model\.classifier"
    ):
        get_peft_model(tiny_bert(num_labels=5), config)
