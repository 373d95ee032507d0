"""The work folder: whole files, only one build's, and fits that go on where they stopped."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.artifacts.locks import one_writer
from eigenpeft.building.module_fitter import ModuleFitter
from eigenpeft.building.work_folder import FittedModule, Shards
from eigenpeft.errors import ArtifactError, CollectionError, SubspaceError
from tests.factories import MODULES, make_collection, random_factors, write_adapter
from tests.subspace.conftest import random_bases


@pytest.fixture
def collection(tmp_path):
    made = make_collection(tmp_path / "adapters", rank=(4, 2, 3), n_shared=6, noise=0.3)
    with AdapterCollection.from_pretrained(made.folder) as collection:
        yield collection


class Interrupted(BaseException):
    """What Ctrl-C is: nothing that a fit would catch."""


@pytest.fixture
def interrupted_after_two(monkeypatch):
    """A fit that is interrupted after its second module."""
    saved = []
    save = Shards.save

    def interrupting(self, module, fitted):
        save(self, module, fitted)
        saved.append(module)
        if len(saved) == 2:
            raise Interrupted

    monkeypatch.setattr(Shards, "save", interrupting)
    return saved


def test_what_is_saved_is_loaded(tmp_path):
    plan = {"seed": 0, "modules": ["../layer"]}
    shards = Shards(tmp_path / "work", plan)
    bank = random_bases(6, 20, 12, n_pseudo=2)
    assert "../layer" not in shards
    shards.save("../layer", FittedModule(bank, norms=(1.5, 0.0), missed_bound=0.25))
    assert "../layer" in Shards(tmp_path / "work", plan)
    loaded = shards.load("../layer")
    assert loaded.norms == (1.5, 0.0)
    assert loaded.missed_bound == 0.25
    for name, tensor in bank.tensors().items():
        assert torch.equal(loaded.bank.tensors()[name], tensor)
    assert sorted(path.parent for path in tmp_path.rglob("*.safetensors")) == [tmp_path / "work"]
    shards.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_module_is_told_not_used(tmp_path):
    shards = Shards(tmp_path, {})
    shards.save("layer", FittedModule(random_bases(3, 20, 12), norms=(1.0,)))
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="finished module 'layer' cannot be read back"):
        shards.load("layer")


def test_an_interrupted_fit_goes_on_and_gives_the_same_bytes(tmp_path, collection, interrupted_after_two, monkeypatch):
    whole = SubspaceBuilder(5, n_pseudo_components=2).fit(collection)
    builder = SubspaceBuilder(5, n_pseudo_components=2)
    with pytest.raises(Interrupted):
        builder.fit(collection, work_dir=tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2
    fitted = []
    fit = ModuleFitter.fit
    monkeypatch.setattr(ModuleFitter, "fit", lambda self, module, c: fitted.append(module) or fit(self, module, c))
    builder.fit(collection, work_dir=tmp_path / "work")
    assert sorted(fitted + interrupted_after_two[:2]) == sorted(MODULES)
    assert not (tmp_path / "work").exists()
    assert builder.findings_ == whole.findings_
    for name, fitted_builder in (("whole", whole), ("resumed", builder)):
        fitted_builder.subspace_.save_pretrained(tmp_path / name)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("change", ["n_components", "seed", "adapters"])
def test_another_build_does_not_go_on_with_it(tmp_path, collection, interrupted_after_two, change):
    with pytest.raises(Interrupted):
        SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work")
    builder = SubspaceBuilder(4 if change == "n_components" else 5, seed=1 if change == "seed" else 0)
    other = collection.without(collection.names[0]) if change == "adapters" else collection
    with pytest.raises(
        SubspaceError, match=rf"holds an unfinished build of other .*different: {change}\).*delete the folder"
    ):
        builder.fit(other, work_dir=tmp_path / "work")


def test_bad_input_leaves_no_work_folder(tmp_path, collection):
    with pytest.raises(SubspaceError, match="4 of 4 modules cannot be fitted as asked"):
        SubspaceBuilder(16).fit(collection, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    factors = random_factors()
    factors["layer.1.query"][0][0, 0] = float("nan")
    write_adapter(tmp_path / "adapters" / "bad", factors)
    with (
        AdapterCollection.from_pretrained(tmp_path / "adapters") as with_bad,
        pytest.raises(CollectionError, match="'bad' has 1 of 48 numbers NaN"),
    ):
        SubspaceBuilder(4).fit(with_bad, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_file_in_the_way_is_told(tmp_path, collection):
    (tmp_path / "work").write_text("mine")
    with pytest.raises(ArtifactError, match="Cannot use the work folder .*Choose one you may write to"):
        SubspaceBuilder(4).fit(collection, work_dir=tmp_path / "work")


# What changed between two runs is noticed; nobody's files are deleted.


def interrupted(tmp_path, builder):
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection, pytest.raises(Interrupted):
        builder.fit(collection, work_dir=tmp_path / "work")


def resume(tmp_path, builder):
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        resumed = builder.fit(collection, work_dir=tmp_path / "work").subspace_
        return resumed, builder.fit(collection).subspace_


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_changed_config_is_another_build(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder(5, weighting="none"))
    edit(tmp_path / "adapters" / "adapter-1" / "adapter_config.json", lora_alpha=800)
    with pytest.raises(SubspaceError, match=r"unfinished build of other adapters .*different: adapters\)"):
        resume(tmp_path, SubspaceBuilder(5, weighting="none"))


def test_a_changed_config_that_changes_no_update_is_the_same_build(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder(5))
    edit(tmp_path / "adapters" / "adapter-1" / "adapter_config.json", inference_mode=False, lora_dropout=0.5)
    resumed, fresh = resume(tmp_path, SubspaceBuilder(5))
    assert resumed.fingerprint == fresh.fingerprint


def test_a_replaced_file_of_the_same_size_and_time_is_another_build(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder(5))
    path = tmp_path / "adapters" / "adapter-1" / "adapter_model.safetensors"
    before = path.stat()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(SubspaceError, match=r"different: adapters\)"):
        resume(tmp_path, SubspaceBuilder(5))


def test_a_copied_file_of_another_time_is_the_same_build(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder(5))
    os.utime(tmp_path / "adapters" / "adapter-1" / "adapter_model.safetensors")
    resumed, fresh = resume(tmp_path, SubspaceBuilder(5))
    assert resumed.fingerprint == fresh.fingerprint


def test_the_order_of_patterns_is_part_of_the_build(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder({"*": 5, "*.query": 3}))
    with pytest.raises(SubspaceError, match=r"different: n_components\)"):
        resume(tmp_path, SubspaceBuilder({"*.query": 3, "*": 5}))


@pytest.mark.parametrize("damage", ["flip", "cut", "other module"])
def test_a_damaged_module_is_fitted_again(tmp_path, collection, interrupted_after_two, caplog, damage):
    interrupted(tmp_path, SubspaceBuilder(5))
    first, second = sorted((tmp_path / "work").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-200] ^= 64
    first.write_bytes({"flip": bytes(data), "cut": bytes(data[:-8]), "other module": second.read_bytes()}[damage])
    resumed, fresh = resume(tmp_path, SubspaceBuilder(5))
    assert resumed.fingerprint == fresh.fingerprint
    assert damage == "other module" or "It is fitted again" in caplog.text


def test_a_folder_of_somebody_else_is_refused_and_untouched(tmp_path, collection):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(ArtifactError, match=r"it holds other files \(thesis.txt\). Name a new or an empty folder"):
        SubspaceBuilder(4).fit(collection, work_dir=tmp_path / "mine")
    (tmp_path / "mine" / "build_plan.json").write_text('{"my": "plan"}')
    with pytest.raises(ArtifactError, match="its build_plan.json was not written by eigenpeft"):
        SubspaceBuilder(4).fit(collection, work_dir=tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["build_plan.json", "thesis.txt"]


@pytest.mark.parametrize("place", ["adapters/adapter-0", "adapters/adapter-0/work"])
def test_a_work_folder_inside_an_adapter_is_refused(tmp_path, collection, place):
    with pytest.raises(ArtifactError, match="is or lies inside .*adapter-0', which is read"):
        SubspaceBuilder(4).fit(collection, work_dir=tmp_path / place)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as again:
        assert again.names == collection.names


def test_what_others_put_into_the_work_folder_stays(tmp_path, collection, interrupted_after_two):
    interrupted(tmp_path, SubspaceBuilder(5))
    (tmp_path / "work" / "thesis.txt").write_text("three years")
    (tmp_path / "work" / ("0" * 32 + ".safetensors")).write_text("mine too")
    (tmp_path / "work" / (".build_plan.json." + "0" * 8 + ".tmp")).write_text("of a killed process")
    resume(tmp_path, SubspaceBuilder(5))
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["0" * 32 + ".safetensors", "thesis.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_what_safetensors_had_begun_when_it_was_killed_does_not_stay(tmp_path, collection, monkeypatch):
    def killed(tensors, path, metadata):
        path.with_name(".tmpQ3xZ9a").write_bytes(b"half a file")  # save_file renames such a file to `path`
        os._exit(9)

    monkeypatch.setattr("eigenpeft.building.work_folder.save_file", killed)
    child = os.fork()
    if not child:
        SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work")
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert any(path.name == ".tmpQ3xZ9a" for path in (tmp_path / "work").rglob("*"))
    SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_two_builds_do_not_share_a_work_folder(tmp_path, collection):
    with one_writer(tmp_path / "work"), pytest.raises(ArtifactError, match="Another process is writing .*work'"):
        SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work")


def test_too_little_memory_names_the_module_and_keeps_what_was_finished(tmp_path, collection, monkeypatch):
    fit = ModuleFitter.fit

    def fails(self, module, collection):
        if module == collection.modules[2]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")
        return fit(self, module, collection)

    with monkeypatch.context() as patch:
        patch.setattr(ModuleFitter, "fit", fails)
        with pytest.raises(SubspaceError, match=rf"Memory does not suffice .*{collection.modules[2]}.*--memory-limit"):
            SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2
    assert (
        SubspaceBuilder(5).fit(collection, work_dir=tmp_path / "work").subspace_
        == SubspaceBuilder(5).fit(collection).subspace_
    )
