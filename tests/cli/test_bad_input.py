"""Bad input of every kind: one message with the values, exit code 1, never a traceback, nothing left on disk."""

import json
import os
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.artifacts import storage
from tests.factories import MODULES, random_factors, write_adapter


def config_of(adapters, change, name="adapter-1"):
    path = adapters.folder / name / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def tensors_of(adapters, change, name="adapter-1"):
    path = adapters.folder / name / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def weights(adapters, name="adapter-1"):
    return adapters.folder / name / "adapter_model.safetensors"


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def pickled_code(adapters):
    weights(adapters).unlink()
    (adapters.folder / "adapter-1" / "adapter_model.bin").write_bytes(pickle.dumps({"x": Code()}))


def with_first(change):
    def apply(adapters):
        def edit(tensors):
            key = sorted(tensors)[0]
            tensors[key] = change(tensors[key])

        tensors_of(adapters, edit)

    return apply


def other_shape(adapters):
    modules = {**MODULES, "layer.0.query": (12, 24)}
    write_adapter(adapters.folder / "adapter-1", random_factors(modules=modules))


# What is done to the adapters, further arguments of `build`, and what the message must name.
BUILDS = {
    "no such folder": (lambda a: shutil.rmtree(a.folder), [], "adapters"),
    "an empty folder": (lambda a: [shutil.rmtree(p) for p in a.folder.iterdir()], [], "no adapter_config.json"),
    "no config": (lambda a: (a.folder / "adapter-1" / "adapter_config.json").unlink(), [], "adapter_config.json"),
    "a config that is no JSON": (
        lambda a: (a.folder / "adapter-1" / "adapter_config.json").write_text("{"),
        [],
        "adapter-1",
    ),
    "no weights": (lambda a: weights(a).unlink(), [], "adapter_model.safetensors"),
    "truncated weights": (lambda a: weights(a).write_bytes(weights(a).read_bytes()[:-100]), [], "adapter-1"),
    "weights of zero bytes": (lambda a: weights(a).write_bytes(b""), [], "adapter-1"),
    "a header that promises too much": (lambda a: weights(a).write_bytes(b"\xff" * 64), [], "adapter-1"),
    "a pickle with code": (pickled_code, [], "adapter_model.bin"),
    "NaN": (with_first(lambda tensor: tensor * float("nan")), [], "NaN"),
    "infinity": (with_first(lambda tensor: tensor / 0.0), [], "adapter-1"),
    "a factor without its twin": (lambda a: tensors_of(a, lambda t: t.pop(sorted(t)[0])), [], "layer.0.query"),
    "a factor of another shape": (with_first(lambda tensor: tensor[:, :-1].contiguous()), [], "adapter-1"),
    "a factor that is no matrix": (with_first(lambda tensor: tensor[None].contiguous()), [], "adapter-1"),
    "shapes that conflict": (other_shape, [], "layer.0.query"),
    "DoRA": (lambda a: config_of(a, {"use_dora": True}), [], "use_dora"),
    "IA3": (lambda a: config_of(a, {"peft_type": "IA3"}), [], "IA3"),
    "a start that changes the base": (lambda a: config_of(a, {"init_lora_weights": "pissa"}), [], "pissa"),
    "another base model": (lambda a: config_of(a, {"base_model_name_or_path": "other/base"}), [], "other/base"),
    "rank zero": (lambda a: config_of(a, {"r": 0, "rank_pattern": {}}), [], "r"),
    "alpha that is no number": (lambda a: config_of(a, {"lora_alpha": "much"}), [], "much"),
    "more components than the rank": (lambda a: None, ["-k", 13], "numerical rank"),
    "no components": (lambda a: None, ["-k", 0], "--n-components 0 must be"),
    "a negative share": (lambda a: None, ["-k", "-0.5"], "--n-components -0.5 must be"),
    "components that are no number": (lambda a: None, ["-k", "many"], "many"),
    "a pattern without a number": (lambda a: None, ["-k", "*.query=many"], "many"),
    "modules that no pattern fits": (lambda a: None, ["-k", "*.query=3"], "no pattern"),
    "an unknown method": (lambda a: None, ["--method", "pca"], "pca"),
    "an unknown weighting": (lambda a: None, ["--weighting", "sum"], "sum"),
    "too many pseudo-components": (
        lambda a: None,
        ["-k", 5, "--n-pseudo-components", 50],
        "--n-pseudo-components 50 directions",
    ),
    "an unknown adapter to leave out": (lambda a: None, ["--exclude", "../../x"], "../../x"),
    "every adapter untrained": (
        lambda a: [tensors_of(a, lambda t: [t[k].zero_() for k in t if "lora_B" in k], name) for name in a.names],
        [],
        "zero",
    ),
}


@pytest.mark.parametrize("case", BUILDS)
def test_build_refuses(run, adapters, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    spoil, arguments, named = BUILDS[case]
    spoil(adapters)
    before = {path.name for path in tmp_path.iterdir()}
    components = [] if "-k" in arguments else ["-k", 5]
    result = run("build", adapters.folder, *components, *arguments, "-o", tmp_path / "subspace")
    assert_refused(result, named)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.fixture
def subspace(adapters, tmp_path):
    built = SubspaceBuilder(5).fit(AdapterCollection.from_pretrained(adapters.folder)).subspace_
    built.save_pretrained(tmp_path / "subspace")
    return tmp_path / "subspace"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


# What is done to the subspace's folder, and what the message must name.
SUBSPACES = {
    "a flipped byte": (lambda s: flip(s / "subspace.safetensors", -1), "fingerprint"),
    "a truncated file": (
        lambda s: (s / "subspace.safetensors").write_bytes((s / "subspace.safetensors").read_bytes()[:500]),
        "not a whole safetensors file",
    ),
    "no tensors": (lambda s: (s / "subspace.safetensors").unlink(), "incomplete"),
    "no config": (lambda s: (s / "subspace_config.json").unlink(), "incomplete"),
    "a config that is no JSON": (lambda s: (s / "subspace_config.json").write_text("["), "JSON"),
    "a newer format": (
        lambda s: (s / "subspace_config.json").write_text(json.dumps({"format_version": 99})),
        "format_version 99",
    ),
    "no folder": (lambda s: shutil.rmtree(s), "Looked for a local folder"),
}


@pytest.mark.parametrize("case", SUBSPACES)
@pytest.mark.parametrize("command", ["inspect", "project"])
def test_a_damaged_subspace_is_refused(run, adapters, subspace, tmp_path, case, command):
    spoil, named = SUBSPACES[case]
    spoil(subspace)
    before = {path.name for path in tmp_path.iterdir()}
    further = [] if command == "inspect" else [adapters.folder, "-o", tmp_path / "store"]
    assert_refused(run(command, subspace, *further), named)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_project_refuses_adapters_of_another_shape(run, subspace, tmp_path):
    other = write_adapter(tmp_path / "other", random_factors(modules={"layer.0.query": (12, 24)}))
    assert_refused(run("project", subspace, other, "-o", tmp_path / "store"), "12 x 24")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["nobody", "../../x", "adapter-1/../adapter-2"])
def test_export_refuses_names_that_are_no_members(run, adapters, subspace, tmp_path, name):
    run("project", subspace, adapters.folder, "-o", tmp_path / "store")
    assert_refused(run("export", tmp_path / "store", name, "-o", tmp_path / "lora"), name)
    assert not (tmp_path / "lora").exists()


def test_export_refuses_a_rank_below_one_and_a_folder_of_something_else(run, adapters, subspace, tmp_path):
    run("project", subspace, adapters.folder, "-o", tmp_path / "store")
    assert_refused(
        run("export", tmp_path / "store", "adapter-1", "--rank", 0, "-o", tmp_path / "lora"), "--rank 0 must be"
    )
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "thesis.txt").write_text("three years of work")
    assert_refused(run("export", tmp_path / "store", "adapter-1", "-o", tmp_path / "lora"), "thesis.txt")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way(run, adapters, tmp_path):
    (tmp_path / "subspace").write_text("mine")
    assert_refused(run("build", adapters.folder, "-k", 5, "-o", tmp_path / "subspace"), "in the way")
    assert (tmp_path / "subspace").read_text() == "mine"


def test_a_place_that_cannot_be_written(run, adapters, tmp_path):
    (tmp_path / "file").write_text("")  # root may write to read-only folders, but nobody below a file
    assert_refused(run("build", adapters.folder, "-k", 5, "-o", tmp_path / "file" / "subspace"), "Cannot write to")


def test_a_full_disk_leaves_what_was_there(run, adapters, subspace, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in subspace.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    assert_refused(run("build", adapters.folder, "-k", 4, "-o", subspace, "--overwrite"), "No space left on device")
    assert {path.name: path.read_bytes() for path in subspace.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} - {"subspace.work"} == {"adapters", "subspace"}


def test_hostile_module_names_never_become_paths(run, tmp_path):
    modules = {"../../escape.query": (6, 8), "layer.0.query": (6, 8)}
    write_adapter(tmp_path / "adapters" / "hostile", random_factors(modules=modules, rank=2))
    run("build", tmp_path / "adapters", "-k", 2, "-o", tmp_path / "out" / "subspace")
    assert {path.name for path in tmp_path.iterdir()} <= {"adapters", "out"}
    assert not any("escape" in path.name for path in tmp_path.rglob("*"))


def assert_refused(result, named):
    assert result.code == 1, (result.code, result.out, result.err)
    message = result.err[result.err.index("Error:") :]
    assert str(named) in message.replace("\n", " ") or str(named) in message
    assert "Traceback" not in result.err
    assert "Error:" not in result.out
