"""CoefficientStore: one file, lazy members, exact round trips, errors that are those of ΔW."""

import json

import pytest
import torch
from safetensors import safe_open

from eigenpeft import AdapterCollection, CoefficientStore, PrincipalSubspace, SubspaceBuilder
from eigenpeft.errors import ArtifactError, SubspaceError, SubspaceNotFoundError
from tests.factories import MODULES, make_collection, random_factors, write_adapter


@pytest.fixture
def made(tmp_path):
    made = make_collection(tmp_path / "adapters", rank=(4, 2), n_shared=6, noise=0.3)
    fewer = {"layer.0.query": MODULES["layer.0.query"]}
    write_adapter(tmp_path / "adapters" / "partial", random_factors(modules=fewer, rank=3, seed=3))
    return made


@pytest.fixture
def store(made):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        subspace = SubspaceBuilder(n_components=5).fit(collection).subspace_
        return CoefficientStore.from_collection(subspace, collection)


def test_errors_are_those_of_the_update(made, store):
    for name, updates in made.updates.items():
        for module, update in updates.items():
            lora_B, lora_A = store.factors(name, module)
            error = torch.linalg.norm(update - lora_B.double() @ lora_A.double()) / torch.linalg.norm(update)
            assert store.relative_errors[module][name] == pytest.approx(float(error), rel=1e-3)


def test_missing_modules_stay_missing(store):
    assert store["partial"].keys() == {"layer.0.query"}
    assert store.factors("partial", "layer.1.query") is None
    assert "partial" not in store.relative_errors["layer.1.query"]
    assert store["adapter-0"]["layer.1.query"].coefficients_in.shape == (4, 5)
    assert store["adapter-1"]["layer.1.query"].coefficients_out.shape == (5, 2)


def test_save_and_load_are_exact(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    loaded = CoefficientStore.from_pretrained(tmp_path / "store")
    assert loaded.names == store.names
    assert loaded.members == store.members
    assert loaded.subspace == store.subspace
    for name in store.names:
        for module, coefficients in store[name].items():
            assert torch.equal(loaded[name][module].coefficients_in, coefficients.coefficients_in)
            assert torch.equal(loaded[name][module].coefficients_out, coefficients.coefficients_out)
    assert loaded.n_bytes == store.n_bytes
    size = (tmp_path / "store" / "store.safetensors").stat().st_size
    assert store.n_bytes < size < store.n_bytes + 8000
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "store.safetensors").read_bytes() == (
        tmp_path / "store" / "store.safetensors"
    ).read_bytes()


def test_a_member_is_read_alone(store, tmp_path, monkeypatch):
    store.save_pretrained(tmp_path / "store")
    loaded = CoefficientStore.from_pretrained(tmp_path / "store")
    read = []

    class Recorder:
        def __init__(self, file):
            self.file = file

        def get_slice(self, name):
            outer = self

            class Rows:
                def __getitem__(self, rows):
                    read.append((name, rows.start, rows.stop))
                    return outer.file.get_slice(name)[rows]

            return Rows()

    loaded._rows = Recorder(loaded._rows)
    loaded["adapter-1"]
    with safe_open(tmp_path / "store" / "store.safetensors", framework="pt") as file:
        total = file.get_slice("layer.0.query.coefficients_in").get_shape()[0]
    assert {name for name, *_ in read} == {
        f"{module}.coefficients_{side}" for module in MODULES for side in ("in", "out")
    }
    assert all((start, stop) == (4, 6) for _, start, stop in read)
    assert total == 4 + 2 + 4 + 2 + 4 + 3


def test_a_store_serves_as_a_subspace(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    assert PrincipalSubspace.from_pretrained(tmp_path / "store") == store.subspace
    store.subspace.save_pretrained(tmp_path / "subspace")
    with pytest.raises(ArtifactError, match="is not a coefficient store: it has no store_config.json"):
        CoefficientStore.from_pretrained(tmp_path / "subspace")


def test_unknown_members_name_the_known(store):
    with pytest.raises(KeyError, match="'nobody' is not in the store; it has 6 adapters: 'adapter-0'"):
        store["nobody"]


def test_a_damaged_store_is_one_error(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    config = tmp_path / "store" / "store_config.json"
    whole = json.loads(config.read_text())
    for damage, message in (
        ({"members": whole["members"][:2]}, "does not fit its config"),
        ({"members": [whole["members"][0]] * 6}, "same name"),
        ({"subspace_sha256": "0"}, "a file was altered"),
        ({"subspace": {}}, "lists no modules"),
        ({"format_version": 2}, "format_version 2"),
    ):
        config.write_text(json.dumps(whole | damage))
        with pytest.raises(ArtifactError, match=message):
            CoefficientStore.from_pretrained(tmp_path / "store")
    config.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        CoefficientStore.from_pretrained(tmp_path / "store")
    with pytest.raises(SubspaceNotFoundError, match="No coefficient store at"):
        CoefficientStore.from_pretrained(tmp_path / "elsewhere")


def test_modules_outside_the_subspace_are_an_error(made, store, tmp_path):
    write_adapter(tmp_path / "other", random_factors(modules={"layer.7.query": (12, 20)}))
    with (
        AdapterCollection.from_pretrained(tmp_path / "other") as collection,
        pytest.raises(
            SubspaceError, match="1 of the 1 adapted modules are not in the subspace, such as 'layer.7.query'"
        ),
    ):
        CoefficientStore.from_collection(store.subspace, collection)


def test_untrained_adapters_are_reproduced_exactly(store, tmp_path):
    zero = {name: (torch.zeros_like(B), A) for name, (B, A) in random_factors().items()}
    write_adapter(tmp_path / "untrained", zero)
    with AdapterCollection.from_pretrained(tmp_path / "untrained") as collection:
        projected = CoefficientStore.from_collection(store.subspace, collection)
    assert {error for row in projected.relative_errors.values() for error in row.values()} == {0.0}
