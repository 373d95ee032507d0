"""What goes into a store comes out with the same logits: cores, heads, biases and trained tokens, for plain PEFT."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, MosLoraConfig, SubspaceBuilder, export_lora
from eigenpeft.errors import AdapterConfigError, CollectionError, SubspaceError
from eigenpeft.subspace import PrincipalSubspace
from tests.factories import tiny_bert
from tests.tuners.conftest import random_subspace

TOKENS = torch.arange(1, 13).view(2, 6)
HEAD = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


def randomised(model, seed=0):
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
    model = randomised(get_peft_model(tiny_bert(), config))
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
        assert saved.keys() == parts.keys() | member.kept.keys()
        assert all(torch.equal(tensor, saved[key]) for key, tensor in {**parts, **member.kept}.items())
        assert member.kept.keys() == HEAD
    export_lora(store, tmp_path / "plain", adapter_name="adapter")
    back = PeftModel.from_pretrained(tiny_bert(), tmp_path / "plain")
    torch.testing.assert_close(logits(back.eval()), logits(model), atol=1e-6, rtol=0)


def test_adapters_that_embed_their_subspace_or_use_a_part_of_it(subspace, tmp_path):
    store = AdapterStore(subspace)
    for name, options in (("embedded", {}), ("first", {"n_components": 4})):
        model = randomised(get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=2, core="full", **options)))
        store.add(model, name=name)
        assert not any("components" in key for key in store[name].kept)
        export_lora(store, tmp_path / name, adapter_name=name)
        back = PeftModel.from_pretrained(tiny_bert(), tmp_path / name)
        torch.testing.assert_close(logits(back.eval()), logits(model), atol=1e-6, rtol=0)
    assert {core.n_in for core in store["first"].values()} == {4}
    assert store.cores(subspace.modules[0]).shape == (2, 6, 6)


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all"}, {"trainable_token_indices": [3, 5]}], ids=["head", "bias", "tokens"]
)
def test_lora_adapters_keep_what_they_trained_besides_updates(tmp_path, options):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", **options)
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        model = randomised(get_peft_model(tiny_bert(), config), seed=seed)
        model.save_pretrained(tmp_path / "adapters" / name)
        wanted[name] = logits(model)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        bases = SubspaceBuilder(n_components=4).fit(collection).subspace_  # holds both whole
        store = AdapterStore.from_collection(bases, collection)
    for name in wanted:
        assert store[name].kept.keys() >= HEAD
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
