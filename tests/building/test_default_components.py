"""The default number of components: 32, or all that a module has, said by name; a number that is asked for is a number."""

import pytest

from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import SubspaceError
from tests.factories import random_factors, write_adapter

USUAL = {"layer.0.q": (40, 48), "layer.0.v": (40, 48)}


@pytest.fixture
def collection(tmp_path):
    """Five adapters of rank 8, of which one adapts a module more."""
    for seed in range(5):
        modules = USUAL | ({"layer.0.o": (40, 48)} if seed == 0 else {})
        write_adapter(tmp_path / f"a{seed}", random_factors(seed=seed, rank=8, modules=modules))
    return AdapterCollection.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["balanced", "hosvd", "hooi", "eigenlorax"])
def test_one_adapter_with_more_modules_is_said_and_stops_nothing(collection, method):
    builder = SubspaceBuilder(method=method).fit(collection)
    assert {name: bases.n_components for name, bases in builder.subspace_.items()} == {
        "layer.0.q": 32, "layer.0.v": 32, "layer.0.o": 8
    }  # fmt: skip
    (finding,) = [each for each in builder.findings_ if each.kind == "fewer_components"]
    assert finding.adapters == ("a0",)
    assert "1 of the 3 modules have fewer than 32 components" in finding.message
    assert "8 in 'layer.0.o'" in finding.message


def test_a_number_that_is_asked_for_is_not_lowered(collection):
    with pytest.raises(
        SubspaceError, match=r"1 of 3 modules cannot be fitted as asked:\n- layer.0.o: n_components=32 exceeds"
    ):
        SubspaceBuilder(32).fit(collection)


def test_the_work_folder_and_equal_adapters(tmp_path):
    pairs = random_factors(rank=8, modules=USUAL)
    for name in ("one", "two"):  # twice the same: 16 rows, eight directions
        write_adapter(tmp_path / "adapters" / name, pairs)
    adapters = AdapterCollection.from_pretrained(tmp_path / "adapters")
    builder = SubspaceBuilder().fit(adapters, work_dir=tmp_path / "work")
    assert {bases.n_components for bases in builder.subspace_.values()} == {8}
    assert [each.adapters for each in builder.findings_ if each.kind == "fewer_components"] == [("one", "two")]
    assert SubspaceBuilder.from_subspace(builder.subspace_).n_components is None
