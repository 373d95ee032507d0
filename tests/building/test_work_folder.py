"""The work folder: whole files, only one build's, and fits that go on where they stopped."""

import pytest
import torch

from eigenpeft import AdapterCollection, SubspaceBuilder
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
    shards = Shards(tmp_path / "work", {"seed": 0})
    bases = random_bases(6, 20, 12, n_pseudo=2)
    assert "../layer" not in shards
    shards.save("../layer", FittedModule(bases, norms=(1.5, 0.0), missed_bound=0.25))
    assert "../layer" in Shards(tmp_path / "work", {"seed": 0})
    loaded = shards.load("../layer")
    assert loaded.norms == (1.5, 0.0)
    assert loaded.missed_bound == 0.25
    for name, tensor in bases.tensors().items():
        assert torch.equal(loaded.bases.tensors()[name], tensor)
    assert sorted(path.parent for path in tmp_path.rglob("*.safetensors")) == [tmp_path / "work"]
    shards.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_module_is_told_not_used(tmp_path):
    shards = Shards(tmp_path, {})
    shards.save("layer", FittedModule(random_bases(3, 20, 12), norms=(1.0,)))
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="finished module 'layer' cannot be read back .* Delete the file"):
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
