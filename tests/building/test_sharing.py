"""One bank for the modules of one kind and shape, against the definition in float64."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, PrincipalSubspace, SubspaceBuilder
from eigenpeft.building import build_shared_subspace
from eigenpeft.building.sharing import last_name
from eigenpeft.errors import CollectionError, SubspaceError
from tests.factories import make_collection

MODULES = {"layers.0.q": (12, 10), "layers.1.q": (12, 10), "layers.0.v": (12, 10), "layers.1.odd.v": (8, 10)}


@pytest.fixture
def made(tmp_path):
    return make_collection(tmp_path / "adapters", rank=(2, 3), modules=MODULES)


@pytest.fixture
def collection(made):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        yield collection


@pytest.mark.parametrize("method", ["balanced", "hooi"])
def test_modules_of_one_kind_and_shape_share_a_bank(made, collection, tmp_path, method):
    subspace = build_shared_subspace(collection, n_components=4, method=method, progress=False)
    assert subspace.modules == collection.modules
    assert subspace["layers.0.q"] is subspace["layers.1.q"]
    assert len(subspace.banks) == 3  # v has two shapes
    bank = subspace["layers.0.q"]
    shares = []
    for updates in made.updates.values():
        for module in ("layers.0.q", "layers.1.q"):
            update = updates[module].double() / updates[module].double().norm()
            shares.append((bank.components_out.double() @ update @ bank.components_in.double().T).norm() ** 2)
    assert bank.explained_share == pytest.approx(float(torch.stack(shares).mean()), abs=1e-5)
    subspace.save_pretrained(tmp_path / "subspace")
    assert PrincipalSubspace.from_pretrained(tmp_path / "subspace") == subspace


def test_a_kind_with_one_module_has_the_bank_that_the_builder_makes(collection):
    own = SubspaceBuilder(n_components=4).fit(collection).subspace_
    shared = build_shared_subspace(collection, n_components=4, kind_of=str, progress=False)
    assert shared == own


def test_a_shared_bank_holds_no_more_than_banks_of_their_own(collection):
    own = SubspaceBuilder(n_components=4, method="hooi").fit(collection).subspace_
    shared = build_shared_subspace(collection, n_components=4, method="hooi", progress=False)
    assert (
        shared["layers.0.q"].explained_share
        < (own["layers.0.q"].explained_share + own["layers.1.q"].explained_share) / 2
    )


def test_what_cannot_be_built_is_refused(collection):
    with pytest.raises(SubspaceError, match="The bank of 2 modules, such as 'layers.0.q': n_components=99 exceeds"):
        build_shared_subspace(collection, n_components=99, progress=False)
    with pytest.raises(SubspaceError, match="method='none' must be one of 'balanced'"):
        build_shared_subspace(collection, method="none", progress=False)  # pyright: ignore[reportArgumentType]


def test_the_kind_is_the_last_part_of_a_name():
    assert last_name("encoder.layer.3.attention.self.query") == "query"
    assert last_name("blocks.0") == "blocks"
    assert last_name("0") == "0"


def test_the_builder_shares_by_layers_or_patterns(collection):
    by_layers = SubspaceBuilder(4, share="layers").fit(collection).subspace_
    assert by_layers == build_shared_subspace(collection, n_components=4)
    first = collection.modules[0]
    kind = first.split(".")[-1]
    by_pattern = SubspaceBuilder(4, share=[f"*.{kind}"]).fit(collection).subspace_
    n_shared = sum(module.endswith(f".{kind}") for module in collection.modules)
    assert n_shared > 1
    assert len(by_pattern.banks) == len(collection.modules) - n_shared + 1
    with pytest.raises(SubspaceError, match="share='layer' must be 'layers', a list of patterns"):
        SubspaceBuilder(4, share="layer").fit(collection)
    with pytest.raises(SubspaceError, match="share= goes without n_pseudo_components and memory_limit; got 2 and None"):
        SubspaceBuilder(4, share="layers", n_pseudo_components=2).fit(collection)
    with pytest.raises(SubspaceError, match="n_components='auto' cannot be looked for in shared banks"):
        SubspaceBuilder("auto", share="layers").fit(collection)


def test_an_adapter_that_cannot_be_read_is_named_as_such(made):
    path = made.folder / "adapter-1" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with (
        AdapterCollection.from_pretrained(made.folder) as collection,
        pytest.raises(CollectionError, match="adapter-1"),
    ):
        SubspaceBuilder(2, share="layers").fit(collection)
