"""What goes into a store comes out with the same logits: cores, heads, biases and trained tokens, for plain PEFT."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, MosLoraConfig, SubspaceBuilder, export_lora
from eigenpeft.errors import AdapterConfigError, CollectionError, SubspaceError
from eigenpeft.subspace import PrincipalSubspace
from tests.factories import tiny_bert, write_adapter
from tests.tuners.conftest import random_subspace

TOKENS = torch.arange(1, 13).view(2, 6)
HEAD = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


def randomized(model, seed=0):
    """As if it had been trained: every trainable tensor gets random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def subspace():
    return random_subspace(tiny_bert(), ("query", "value"), n_components=6, seed=1)


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
def test_a_trained_adapter_goes_in_and_comes_out_bit_for_bit(subspace, tmp_path, core):
    subspace.save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=3, lora_alpha=7, core=core, task_type="SEQ_CLS")
    model = randomized(get_peft_model(tiny_bert(), config))
    model.save_pretrained(tmp_path / "adapter")
    store = AdapterStore(subspace)
    store.add(model, name="from the model")
    store.add(tmp_path / "adapter")
    store.save_pretrained(tmp_path / "store")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ("from the model", "adapter"):
        member = AdapterStore.from_pretrained(tmp_path / "store")[name]
        assert member.kinds == (core,)
        assert {one.scaling for one in member.values()} == {7 / 3}
        assert not member.relative_errors
        parts = {
            f"base_model.model.{member.path(module)}.lora_{'A' if part.endswith('in') else 'B'}.coefficients": tensor
            for module, one in member.items()
            for part, tensor in one.parts.items()
        }
        assert saved.keys() == parts.keys() | member.kept_aside.keys()
        assert all(torch.equal(tensor, saved[key]) for key, tensor in {**parts, **member.kept_aside}.items())
        assert member.kept_aside.keys() == HEAD
    export_lora(store, tmp_path / "plain", adapter_name="adapter")
    back = PeftModel.from_pretrained(tiny_bert(), tmp_path / "plain")
    torch.testing.assert_close(logits(back.eval()), logits(model), atol=1e-6, rtol=0)


def test_adapters_that_embed_their_subspace_or_use_a_part_of_it(subspace, tmp_path):
    store = AdapterStore(subspace)
    for name, options in (("embedded", {}), ("first", {"n_components": 4})):
        model = randomized(get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=2, core="full", **options)))
        store.add(model, name=name)
        assert not any("components" in key for key in store[name].kept_aside)
        export_lora(store, tmp_path / name, adapter_name=name)
        back = PeftModel.from_pretrained(tiny_bert(), tmp_path / name)
        torch.testing.assert_close(logits(back.eval()), logits(model), atol=1e-6, rtol=0)
    assert {core.n_components_in for core in store["first"].values()} == {4}
    assert store.cores(subspace.modules[0]).shape == (2, 6, 6)


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all"}, {"trainable_token_indices": [3, 5]}], ids=["head", "bias", "tokens"]
)
def test_lora_adapters_keep_what_they_trained_besides_updates(tmp_path, options):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", **options)
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        model = randomized(get_peft_model(tiny_bert(), config), seed=seed)
        model.save_pretrained(tmp_path / "adapters" / name)
        wanted[name] = logits(model)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        bases = SubspaceBuilder(n_components=4).fit(collection).subspace_  # holds both whole
        store = AdapterStore.from_collection(bases, collection)
    for name in wanted:
        assert store[name].kept_aside.keys() >= HEAD
        export_lora(store, tmp_path / "plain" / name, adapter_name=name)
        back = PeftModel.from_pretrained(tiny_bert(), tmp_path / "plain" / name).eval()
        torch.testing.assert_close(logits(back), wanted[name], atol=1e-4, rtol=0)
        assert not torch.allclose(wanted[name], logits(tiny_bert()), atol=1e-2)


def test_a_store_of_format_1_exports_folders_that_load_and_says_what_is_lost(tmp_path, caplog):
    saved = Path(__file__).parents[2] / "data" / "format_1" / "store"
    shutil.copytree(saved, tmp_path / "store")
    store = AdapterStore.from_pretrained(tmp_path / "store")
    export_lora(store, tmp_path / "plain", adapter_name="adapter-0")
    assert "'adapter-0' is exported without a task type, because the store lacks its head" in caplog.text
    shapes = {module: (bases.out_features, bases.in_features) for module, bases in store.subspace.items()}
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(shapes)


def test_what_a_store_does_not_keep_is_refused_by_name(subspace, tmp_path):
    store = AdapterStore(subspace)
    names = list(subspace.modules)
    cases = [
        (EigenLoraConfig(subspace=subspace, r=2, use_dora=True), SubspaceError, "has use_dora=True"),
        (MosLoraConfig(r=2, target_modules=["query"]), CollectionError, "export_lora"),
        (
            LoraConfig(r=2, target_modules=["dense"]),
            SubspaceError,
            r"4 of the 4 adapted modules .* not in the subspace|dense",
        ),
        (
            EigenLoraConfig(subspace=PrincipalSubspace({name: subspace[name] for name in names[:2]}), r=2),
            SubspaceError,
            "was trained on bases of fingerprint",
        ),
    ]
    for config, error, message in cases:
        with pytest.raises(error, match=message):
            store.add(get_peft_model(tiny_bert(), config), name="x")
    with pytest.raises(SubspaceError, match="adapter_name='other' is not in the model; it has 'default'"):
        store.add(get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"])), adapter_name="other")
    assert len(store) == 0


def test_a_task_type_that_peft_does_not_know_is_one_error(subspace, tmp_path):
    store = AdapterStore(subspace)
    store.add(get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=2)), name="x")
    member = store["x"]
    member.record["config"]["task_type"] = "../x"
    store.add(member, name="y")
    with pytest.raises(AdapterConfigError, match=r"'y' names task_type='\.\./x', which PEFT does not know"):
        export_lora(store, tmp_path / "out", adapter_name="y")
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_was_kept_needs_both_factors_and_a_config(subspace, tmp_path):
    store = AdapterStore(subspace)
    store.add(get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=2)), name="x")
    key = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_"
    half = dataclasses.replace(store["x"], kept_aside={f"{key}A": torch.ones(2, 64)})
    store.add(half, name="half")
    with pytest.raises(
        AdapterConfigError, match=r"one factor of '.*word_embeddings' without the other; add its adapter"
    ):
        export_lora(store, tmp_path / "out", adapter_name="half")
    both = {f"{key}A": torch.ones(2, 64), f"{key}B": torch.ones(32, 2)}
    config = {**store["x"].config, "r": "two"}
    store.add(dataclasses.replace(store["x"], kept_aside=both, record={"config": config}), name="odd")
    with pytest.raises(AdapterConfigError, match=r"own configuration .*'two'.*; add its adapter again"):
        export_lora(store, tmp_path / "out", adapter_name="odd")
    assert not (tmp_path / "out").exists()


def llava():
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return LlavaForConditionalGeneration(config).eval()


# PEFT warns that the adapter has nothing for the vision tower, which such targets mean too.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (r".*language_model.*\.(q_proj|v_proj)", str),
        (["q_proj", "v_proj"], set),
        (r"(language_model\.)+model.*(q_proj|v_proj)", None),  # nothing that takes time is handed on
    ],
)
def test_names_of_an_older_transformers_still_load_out_of_a_store(tmp_path, targets, written):
    modules = [f"language_model.model.layers.0.self_attn.{name}_proj" for name in "qv"]
    for seed in (1, 2):
        folder = tmp_path / "adapters" / str(seed)
        write_adapter(folder, factors_of(modules, seed), target_modules=targets, task_type="CAUSAL_LM")
    adapters = AdapterCollection.from_pretrained(str(tmp_path / "adapters"))
    store = AdapterStore.from_collection(SubspaceBuilder(n_components=4).fit(adapters).subspace_, adapters)
    export_lora(store, tmp_path / "plain", adapter_name="1")
    own = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["target_modules"]
    if written is None:
        assert sorted(own) == sorted(modules)
        return
    assert own == targets if written is str else sorted(own) == sorted(targets)
    expected = PeftModel.from_pretrained(llava(), tmp_path / "adapters" / "1").eval()(input_ids=TOKENS).logits
    assert (expected - llava()(input_ids=TOKENS).logits).abs().max() > 1e-2
    back = PeftModel.from_pretrained(llava(), tmp_path / "plain").eval()
    torch.testing.assert_close(back(input_ids=TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def factors_of(modules, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (0.3 * torch.randn(32, 2, generator=generator), 0.3 * torch.randn(2, 32, generator=generator))
        for module in modules
    }


@pytest.mark.parametrize("change", [{"layers_to_transform": [0]}, {"target_modules": ["query", "key"]}, {}])
def test_members_own_targets_are_written_where_they_mean_its_modules(subspace, tmp_path, change):
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    store = AdapterStore(subspace)
    store.add(tmp_path / "adapter")
    export_lora(store, tmp_path / "plain", adapter_name="adapter")
    own = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["target_modules"]
    assert (sorted(own) == ["query", "value"]) == (not change)
    assert change or len(PeftModel.from_pretrained(tiny_bert(), tmp_path / "plain").targeted_module_names) == len(
        subspace
    )


def test_a_trained_adapter_whose_file_cannot_be_read_is_named(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), task_type="SEQ_CLS")
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"cut")
    store = AdapterStore(subspace)
    with pytest.raises(CollectionError, match=r"Adapter 'cut' .*adapter_model.safetensors"):
        store.add(tmp_path / "cut")
    assert not store.names
