"""What every config promises: making one opens nothing, JSON takes all of it, and each number it starts from has its source."""

import builtins
import dataclasses
import gc
import json
import os
import pathlib
import pickle
import re
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from eigenpeft import AdapterStore, EigenLoraConfig, MosLoraConfig, trainers
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners import ShardLoraConfig
from eigenpeft.tuners.eigenlora.bases import adapted_layers, find_bases
from eigenpeft.tuners.gated import GatedLoraConfig
from eigenpeft.tuners.layers.shared_bases import recall
from eigenpeft.tuners.starts.config import StartedLoraConfig
from tests.tuners.conftest import random_subspace, tiny_llama

CONFIGS = [EigenLoraConfig, MosLoraConfig, ShardLoraConfig, GatedLoraConfig]
ALL_CONFIGS = [*CONFIGS, StartedLoraConfig, *([trainers.LoReConfig] if find_spec("trl") else [])]
NOWHERE = pathlib.Path("nowhere/at-all")
# Folders that are not there: whoever looks for one of them while the config is made meets an error.
SETTINGS = {
    "subspace": (EigenLoraConfig, {"subspace": NOWHERE, "r": 4, "core": "full", "n_components": 3}),
    "warm start": (EigenLoraConfig, {"subspace": str(NOWHERE), "init_from": "nowhere", "init_scale": 0.5}),
    "merged start": (
        EigenLoraConfig,
        {
            "subspace": "nowhere/bases",
            "init_from": "ties",
            "init_adapters": [NOWHERE],
            "init_options": {"density": 0.2},
        },
    ),
    "mixture": (
        EigenLoraConfig,
        {"core": "mixture", "sources": NOWHERE, "init_weights": (0.5, 1), "weights": "module"},
    ),
    "mosLoRA": (MosLoraConfig, {"r": 3, "init_mixer": "orthogonal", "train_mixer": False}),
    "shards": (
        ShardLoraConfig,
        {"r": 5, "pool_rank": 3, "private_rank": 2, "share": ["*.q_proj", "*.k_proj"], "seed": 7},
    ),
    "gated store": (GatedLoraConfig, {"sources": NOWHERE, "train_cores": False, "balance": 0.1}),
    "gated subspace": (GatedLoraConfig, {"subspace": NOWHERE, "n_cores": 2}),
}


def own_fields(cls):
    return [field for field in dataclasses.fields(cls) if field.name in cls.__dict__.get("__annotations__", {})]


@pytest.mark.parametrize(("cls", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_making_one_opens_nothing(cls, settings, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError(f"a file was asked for: {args}")

    with monkeypatch.context() as patches:
        patches.setattr(builtins, "open", refused)
        for name in ("open", "stat", "lstat", "listdir", "scandir"):
            patches.setattr(os, name, refused)
        config = cls(**settings)
    assert config.peft_type.value in ("EIGENLORA", "MOSLORA", "SHARDLORA", "GATEDLORA")


@pytest.mark.parametrize(("cls", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_it_goes_through_json(cls, settings, tmp_path):
    config = cls(**settings)
    values = json.loads(json.dumps(config.to_dict()))
    again = cls(**{name: value for name, value in values.items() if name != "peft_type"})
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8")) == values


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_file_that_was_saved_is_read_with_the_same_fields(cls, tmp_path):
    settings = next(settings for kind, settings in SETTINGS.values() if kind is cls)
    config = cls(**settings)
    config.save_pretrained(str(tmp_path))
    found = cls.from_pretrained(str(tmp_path))
    # What an adapter starts from is not taken from a file: it could name anything of the reader's.
    changed = {name for name in config.to_dict() if getattr(found, name) != getattr(config, name)}
    assert changed <= {"inference_mode", "sources", *(("subspace",) if cls is GatedLoraConfig else ())}


def test_what_is_in_memory_stays_beside_the_fields():
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    for config in (
        EigenLoraConfig(subspace=subspace),
        EigenLoraConfig(core="mixture", sources=AdapterStore(subspace)),
    ):
        assert config.subspace is None
        assert config.subspace_sha256 == subspace.fingerprint
        assert json.loads(json.dumps(config.to_dict()))["subspace_sha256"] == subspace.fingerprint


def test_a_start_stays_beside_the_fields_and_only_targets_are_written(tmp_path):
    start = {"0": (torch.ones(3, 2), torch.ones(2, 4))}
    config = StartedLoraConfig(r=2, lora_alpha=6)
    config.start = start
    assert json.loads(json.dumps(config.to_dict())) == LoraConfig(r=2, lora_alpha=6).to_dict()
    config.save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig
    before = dict(vars(config))
    for _ in range(2):  # the config is as it was, and starts a second model too
        model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        assert torch.equal(model.base_model.model[0].get_delta_weight("default"), 3 * torch.full((3, 4), 2.0))
    changed = {name for name, value in vars(config).items() if before.get(name) is not value}
    assert changed == {"target_modules"}
    assert config.start is start


@pytest.mark.skipif(not find_spec("trl"), reason="needs the extra trl")
def test_the_settings_of_a_trainer_go_through_json(tmp_path):
    cls = trainers.LoReConfig
    config = cls(str(tmp_path / "out"), n_basis=3, strength=2, user_column="who", use_cpu=True, bf16=False)
    values = json.loads(config.to_json_string())
    # transformers writes a mask in the place of every token
    values = {name: value for name, value in values.items() if value != f"<{name.upper()}>"}
    assert cls(**values).to_dict() == config.to_dict()
    assert values["n_basis"] == 3
    assert [field.name for field in own_fields(cls) if field.name not in values] == []
    assert not (tmp_path / "out").exists()  # making one writes nothing


def test_a_subspace_in_memory_is_found_by_copies_of_its_config():
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    config = EigenLoraConfig(subspace=subspace, task_type="CAUSAL_LM")
    values = json.loads(json.dumps(config.to_dict()))
    again = EigenLoraConfig(**{name: value for name, value in values.items() if name != "peft_type"})
    for copied in (dataclasses.replace(config, peft_type=None, r=2), again):
        assert copied.named_bases["held"] is None
        assert find_bases(**copied.named_bases).subspace is subspace


def test_a_pickled_config_brings_the_subspace_that_it_was_given():
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    fingerprint, banks = subspace.fingerprint, dict(subspace)
    text = pickle.dumps(EigenLoraConfig(subspace=subspace, task_type="CAUSAL_LM"))
    del subspace
    gc.collect()
    assert recall(fingerprint) is None  # as in another process
    model = get_peft_model(tiny_llama(), pickle.loads(text))
    assert {name.removeprefix("base_model.model.") for name, _, _ in adapted_layers(model, "default")} == set(banks)


def test_sources_are_a_store_or_its_place():
    with pytest.raises(AdapterConfigError, match=r"sources=3 are adapters and no store: put them into one with"):
        EigenLoraConfig(core="mixture", sources=3)


@pytest.mark.parametrize("cls", ALL_CONFIGS)
def test_every_number_that_is_a_default_has_its_source(cls):
    numbers = [field for field in own_fields(cls) if type(field.default) in (int, float)]
    for field in numbers:
        assert re.search(r"arXiv|paper|Figure|chosen here", field.metadata["help"]), f"{field.name}={field.default}"


def test_a_fingerprint_is_64_hexadecimal_digits():
    for value in ("x", "0" * 63, 7):
        with pytest.raises(
            AdapterConfigError, match=f"subspace_sha256='{value}' must be 64 hexadecimal digits, or None"
        ):
            EigenLoraConfig(subspace="anywhere", subspace_sha256=value)


def test_a_subspace_is_named_or_given():
    with pytest.raises(AdapterConfigError, match="subspace='3' must be a path, a Hub id or a PrincipalSubspace"):
        EigenLoraConfig(subspace=3)
