"""LoRA files of other tools are named as what they are; odd names of modules, bases and repositories are understood."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.base_models import canonical_base
from eigenpeft.collection.formats.keys import parse_key
from eigenpeft.errors import CollectionError
from tests.factories import random_factors, write_adapter

A, B = torch.randn(4, 20), torch.randn(12, 4)


def files(folder, name, keys, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: A.clone() for key in keys}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("name", "keys", "config", "format_"),
    [
        ("adapter_model.safetensors", ["te.lora_down.weight", "te.lora_up.weight", "te.alpha"], PLAIN, "kohya"),
        ("adapter_model.safetensors", ["base_model.model.q.lora_A", "base_model.model.q.lora_B"], PLAIN, "loralib"),
        ("adapter_model.safetensors", ["q.hada_w1_a", "q.hada_w2_a"], PLAIN, "LyCORIS' LoHa"),
        ("adapter_model.safetensors", ["q.lokr_w1", "q.lokr_w2"], PLAIN, "LyCORIS' LoKr"),
        ("adapter_model.safetensors", ["q.lora.down.weight", "q.lora.up.weight"], PLAIN, "diffusers"),
        ("adapters.safetensors", ["q.lora_a", "q.lora_b"], {"fine_tune_type": "lora", "num_layers": 16}, "MLX"),
        ("adapters.safetensors", ["q.lora_a", "q.lora_b"], None, "MLX"),
        ("pytorch_lora_weights.safetensors", ["unet.q.lora_A.weight", "unet.q.lora_B.weight"], None, "diffusers"),
    ],
)
def test_the_format_and_the_way_out_are_named(tmp_path, name, keys, config, format_):
    with pytest.raises(CollectionError, match=rf"LoRA in another format, {format_}.*; name its tensors `base_model"):
        AdapterCollection.from_pretrained(files(tmp_path / "one", name, keys, config))


def test_a_gguf_file_is_named(tmp_path):
    (tmp_path / "adapter-f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(CollectionError, match="'adapter-f16.gguf', a GGUF file"):
        AdapterCollection.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.base_model.model.",
        "base_model.model.base_model.model.base_model.model.",
        "_forward_module.base_model.model.",
        "model.base_model.model.",
        "module.base_model.model.",
        "base_model.model.module.",
        "my_adapter.base_model.model.",
        "base_model.model._orig_mod.base_model.model.",
    ],
)
def test_prefixes_of_wrappers_and_nested_models_are_no_part_of_a_name(tmp_path, prefix):
    assert parse_key(f"{prefix}model.layers.0.q.lora_A.weight").module == "model.layers.0.q"
    modules = {"model.layers.0.q": (12, 20)}
    write_adapter(tmp_path / "usual", random_factors(modules=modules))
    odd = {
        "base_model.model." * 0 + prefix + name: pair for name, pair in random_factors(seed=1, modules=modules).items()
    }
    tensors = {
        f"{name}.lora_{side}.weight": tensor
        for name, pair in odd.items()
        for side, tensor in zip("BA", pair, strict=True)
    }
    folder = write_adapter(tmp_path / "odd", random_factors(modules=modules))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert AdapterCollection.from_pretrained(tmp_path).modules == ("model.layers.0.q",)


def test_a_name_that_only_ends_in_the_prefix_keeps_it():
    assert parse_key("my_base_model.model.q.lora_A.weight").module == "my_base_model.model.q"


def test_a_head_called_lora_is_kept_aside_and_a_variant_is_not(tmp_path):
    folder = write_adapter(tmp_path, random_factors(modules={"layer.0.q": (12, 20)}))
    path = folder / "adapter_model.safetensors"
    factors = {
        "base_model.model.layer.0.q.lora_A.weight": A,
        "base_model.model.layer.0.q.lora_B.weight": B,
    }
    heads = {"base_model.model.lora_head.weight": A.clone(), "base_model.model.lora_head.bias": torch.ones(3)}
    save_file(factors | heads, path)
    with AdapterCollection.from_pretrained(folder) as collection:
        assert set(collection[collection.names[0]].kept_aside) == set(heads)
    save_file(factors | {"base_model.model.layer.0.q.lora_novelty.weight": A.clone()}, path)
    with pytest.raises(CollectionError, match="1 LoRA tensors that plain LoRA does not have"):
        AdapterCollection.from_pretrained(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("roberta-base", "FacebookAI/roberta-base"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("t5-small", "google-t5/t5-small", "google-t5/t5-small/"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("bert-base-uncased", "/cache/models--bert-base-uncased/snapshots/0123", "google-bert/bert-base-uncased"),
        ("a/b", "a/b//", r"C:\cache\models--a--b\snapshots\0123", "/cache/models--a--b/snapshots/4567/"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_names_of_one_base_model_are_one(names):
    assert len({canonical_base(name) for name in names}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpt2", "openai-community/gpt2-medium"),
        ("somebody/gpt2", "openai-community/gpt2"),
        ("/models/gpt2", "openai-community/gpt2"),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_strangers_stay_strangers(tmp_path, one, other):
    assert canonical_base(one) != canonical_base(other)
    for name, base in (("a", one), ("b", other)):
        write_adapter(tmp_path / name, random_factors(), base_model_name_or_path=base)
    with pytest.raises(CollectionError, match="2 different base models"):
        AdapterCollection.from_pretrained(tmp_path)


def hub(tmp_path, *folders):
    revision, cache = "0" * 40, tmp_path / "hub" / "models--owner--many"
    for folder in folders:
        write_adapter(cache / "snapshots" / revision / folder, random_factors())
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    return {"cache_dir": tmp_path / "hub", "local_files_only": True}


def test_an_adapter_in_a_subfolder_of_a_repository(tmp_path):
    where = hub(tmp_path, "legal", "checkpoints/500")
    collection = AdapterCollection.from_pretrained(["owner/many/legal", "owner/many/checkpoints/500@main"], **where)
    assert collection.names == ("legal", "500")
    assert {info.revision for info in collection.adapters} == {"0" * 40}
    with pytest.raises(CollectionError, match="if its adapters are in subfolders, name one: 'owner/many/subfolder'"):
        AdapterCollection.from_pretrained("owner/many", **where)
    with pytest.raises(CollectionError, match="neither a local folder nor a Hub id .* 'owner/name/subfolder'"):
        AdapterCollection.from_pretrained("owner/many/../legal", **where)


def test_fields_that_peft_does_not_have_are_a_finding(tmp_path):
    write_adapter(tmp_path / "new", random_factors(), lora_weight_decomposition="sqrt", other_field=None)
    (finding,) = AdapterCollection.from_pretrained(tmp_path).findings
    assert (finding.kind, finding.adapters) == ("unknown_fields", ("new",))
    assert "'lora_weight_decomposition'" in finding.message
    assert "other_field" not in finding.message
