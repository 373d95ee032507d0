"""Adapters that somebody made to hang, to fill the memory, to run code or to deceive: refused by name, or read right."""

import io
import json
import os
import pickle
import resource
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.formats import patterns as patterns_module
from eigenpeft.collection.formats.patterns import PatternTable
from eigenpeft.collection.formats.torch_files import read_index
from eigenpeft.collection.formats.weights import open_weights
from eigenpeft.errors import CollectionError
from tests.factories import random_factors, write_adapter

KEY = "base_model.model.layer.0.query.lora_A.weight"
MODULES = {"layer.0.query": (12, 20)}


@pytest.fixture
def folder(tmp_path):
    return write_adapter(tmp_path / "adapters" / "hostile", random_factors(modules=MODULES))


@pytest.fixture
def bin_folder(tmp_path):
    return write_adapter(tmp_path / "adapters" / "hostile", random_factors(modules=MODULES), as_bin=True)


def edit(folder, **change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def rewritten(path, change):
    """The zip archive with its members changed by `change(name, content)`, which gives other ones."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            for new_name, new_content, compression in change(name, content):
                archive.writestr(new_name, new_content, compress_type=compression)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_pipes_and_devices_are_neither_waited_for_nor_read(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    if name == "README.md":
        with AdapterCollection.from_pretrained(folder) as collection:
            assert collection["hostile"].license is None
        return
    with pytest.raises(CollectionError, match=rf"Adapter 'hostile' .*{name}.*not a regular file"):
        AdapterCollection.from_pretrained(folder)


def test_a_zip_bomb_is_refused_before_it_inflates(bin_folder):
    path = bin_folder / "adapter_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as member:
        for _ in range(64):
            member.write(bytes(1 << 22))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CollectionError, match="is compressed or encrypted, as torch.save never does"):
        AdapterCollection.from_pretrained(bin_folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes, of 256 MB inflated


def test_an_index_without_end_is_refused(bin_folder, monkeypatch):
    monkeypatch.setattr("eigenpeft.collection.formats.torch_files.MAX_INDEX_BYTES", 100)
    with pytest.raises(CollectionError, match=r"data.pkl has more than the 100 bytes"):
        AdapterCollection.from_pretrained(bin_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: [] if "/data/" in name else [(name, content, 0)], "the numbers of .* are missing"),
        (
            lambda name, content: [(name, content[: len(content) // 2] if "/data/" in name else content, 0)],
            "the numbers of .* are missing",
        ),
        (lambda name, content: [] if name.endswith(".pkl") else [(name, content, 0)], "has no data.pkl"),
        (
            lambda name, content: [(name, b"big" if name.endswith("byteorder") else content, 0)],
            "of the other byte order",
        ),
        (lambda name, content: [(name, content[:-20] if name.endswith(".pkl") else content, 0)], "damaged"),
    ],
)
def test_archives_whose_parts_do_not_fit(bin_folder, change, message):
    rewritten(bin_folder / "adapter_model.bin", change)
    with pytest.raises(CollectionError, match=message):
        AdapterCollection.from_pretrained(bin_folder)


def test_names_in_an_index_are_no_paths(bin_folder, tmp_path):
    (tmp_path / "adapters" / "secret").write_bytes(b"1" * 4096)
    path = bin_folder / "adapter_model.bin"

    def change(name, content):
        if name.endswith("data.pkl"):  # the first storage is said to be ../../secret
            content = content.replace(b"X\x01\x00\x00\x000", b"X\x0c\x00\x00\x00../../secret", 1)
        return [(name, content, 0)]

    rewritten(path, change)
    with pytest.raises(CollectionError, match="the numbers of .* are missing"):
        AdapterCollection.from_pretrained(bin_folder)


@pytest.mark.parametrize(
    "value",
    [
        {"a": bytearray(4)},  # torch's own reader allows bytearray(10**11)
        {"a": print},
        {"a": nn.Linear(1, 1)},
        {"a": range(5)},
    ],
    ids=["bytearray", "function", "module", "range"],
)
def test_an_index_that_would_call_something_is_refused(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        index = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    with pytest.raises(ValueError, match="global|is damaged"):
        content = read_index(index)
        assert not any(isinstance(found, bytes | bytearray) for found in content.values())
        raise ValueError("global function")  # noqa: TRY003 (what was not called is left as its name)


def test_an_index_cannot_ask_for_memory():
    with pytest.raises(ValueError, match="damaged|no end|global"):
        read_index(b"\x80\x02}r\xff\xff\xff\x7fh\xff.")
    with pytest.raises(ValueError, match="global"):
        read_index(pickle.dumps(bytearray(10), protocol=2))


def test_factors_that_were_trained_parameters_are_read_without_their_graph(tmp_path):
    for seed in range(3):
        path = write_adapter(tmp_path / str(seed), random_factors(seed=seed, modules=MODULES), as_bin=True)
        tensors = torch.load(path / "adapter_model.bin", weights_only=True)
        as_zip = seed != 1
        parameters = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
        torch.save(parameters, path / "adapter_model.bin", _use_new_zipfile_serialization=as_zip)
    subspace = SubspaceBuilder(4).fit(AdapterCollection.from_pretrained(tmp_path)).subspace_
    assert not any(tensor.requires_grad for tensor in subspace.tensors().values())


def test_views_of_one_storage_and_other_strides_are_read_right(tmp_path):
    whole = torch.arange(48.0).reshape(6, 8)
    tensors = {"rows": whole[2:4], "columns": whole[:, 3], "turned": whole.mT, "steps": whole[::2, 1::3]}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    opened = open_weights(tmp_path)
    for key, tensor in tensors.items():
        assert torch.equal(opened.read(key), tensor)


def test_a_file_replaced_after_it_was_opened_gives_no_numbers(folder):
    with AdapterCollection.from_pretrained(folder) as collection:
        factors = random_factors(modules=MODULES)
        save_file({"longer": torch.ones(7), KEY: factors["layer.0.query"][1]}, folder / "new")
        (folder / "new").replace(folder / "adapter_model.safetensors")
        with pytest.raises(CollectionError, match="was replaced or changed since its header was read"):
            collection.factors("layer.0.query")
        with pytest.raises(CollectionError, match="was replaced or changed since its header was read"):
            collection["hostile"].record()


def test_a_bin_replaced_by_one_of_another_rank_is_not_scaled_as_the_first(bin_folder):
    collection = AdapterCollection.from_pretrained(bin_folder)
    collection.close()
    write_adapter(bin_folder, random_factors(modules=MODULES, rank=8), as_bin=True)
    with pytest.raises(CollectionError, match="was replaced or changed since its header was read"):
        collection.factors("layer.0.query")


def test_a_bin_cut_in_place_is_an_error_and_no_signal(bin_folder):
    with AdapterCollection.from_pretrained(bin_folder) as collection:
        collection.factors("layer.0.query")
        os.truncate(bin_folder / "adapter_model.bin", 100)
        with pytest.raises(CollectionError, match="was replaced or changed"):
            collection.factors("layer.0.query")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha_pattern", {"(?:(?:a|b)+c?)+(?=x)|(?P<n>.*)(?P=n)z": 4}, None),
        ("rank_pattern", {"((a{1000}){1000}){1000}": 4}, "counted repetitions make more than 10000"),
        ("rank_pattern", {"(": 4}, "is not a regular expression"),
        ("rank_pattern", {"(?i)q": 4}, "is not a regular expression"),
        ("alpha_pattern", {"q" * 5_000: 4}, "a pattern of 5000 characters"),
        ("r", 10**400, "must be a whole number"),
        ("lora_alpha", 1e400, "must be a finite number"),
        ("base_model_name_or_path", "\ud800", "half of a surrogate pair"),
    ],
)
def test_configs_that_would_hang_or_overflow(folder, name, value, message):
    edit(folder, **{name: value})
    if message is None:
        assert AdapterCollection.from_pretrained(folder).names == ("hostile",)
        return
    with pytest.raises(CollectionError, match=message):
        AdapterCollection.from_pretrained(folder)


def test_an_expression_that_backtracks_stops_at_the_time_limit(monkeypatch):
    monkeypatch.setattr(patterns_module, "TIME_LIMIT", 0.05)
    table = PatternTable({r"(?:\w|\w\w)*(?<!x)": 2, "other": 3})
    with pytest.raises(ValueError, match="takes more than 0 seconds to be matched against module names"):
        table.value("x" * 900, default=1)


def test_many_plain_patterns_cost_a_look_up_each():
    patterns = {f"^model.layers.{i}.q_proj": i for i in range(100_000)} | {"k.proj": -1, r"v\.proj": -2}
    table = PatternTable(patterns)
    assert table.value("model.layers.77.q_proj", default=-5) == 77
    assert table.value("model.layersx77.q_proj", default=-5) == 77  # PEFT does not escape the dots
    assert table.value("x.model.layers.77.q_proj", default=-5) == -5
    assert table.value("x.k_proj", default=-5) == -1
    assert table.value("x.v_proj", default=-5) == -5


@pytest.mark.parametrize("name", ["h" + "9" * 5_000, "h" * 70_000])
def test_endless_names_are_refused(folder, name):
    tensors = {f"base_model.model.{name}.weight": torch.zeros(1), KEY: torch.zeros(4, 20)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CollectionError, match="names are longer than 1000 characters"):
        AdapterCollection.from_pretrained(folder)


@pytest.mark.parametrize("name", ["h" + "9" * 900, "h²", "h٣", "h\x00", "层.0", "a\x1b[31mb"])
def test_odd_names_are_sorted_and_kept(folder, name):
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 20), f"{name}.lora_B.weight": torch.ones(12, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert AdapterCollection.from_pretrained(folder).modules == (name,)
