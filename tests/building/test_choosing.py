"""n_components="auto": planted numbers come back, module by module, and what it cannot serve is refused."""

import pytest

from eigenpeft import AdapterCollection, PrincipalSubspace, SubspaceBuilder
from eigenpeft.cli.app import components
from eigenpeft.errors import SubspaceError
from tests.factories import make_collection, random_factors, write_adapter

WIDE = {"layer.0.query": (80, 96), "layer.0.value": (64, 96)}


@pytest.mark.parametrize("method", ["balanced", "hosvd", "hooi", "eigenlorax"])
def test_finds_a_planted_number(tmp_path, method):
    made = make_collection(tmp_path / "made", n_adapters=10, modules=WIDE, n_shared=6, noise=0.03)
    collection = AdapterCollection.from_pretrained(made.folder)
    subspace = SubspaceBuilder("auto", method=method).fit(collection).subspace_
    assert {bases.n_components for bases in subspace.values()} == {6}
    subspace.save_pretrained(tmp_path / "subspace")
    assert PrincipalSubspace.from_pretrained(tmp_path / "subspace").info.n_components == "auto"


def test_by_pattern(tmp_path):
    made = make_collection(tmp_path, n_adapters=10, modules=WIDE, n_shared=6, noise=0.03)
    builder = SubspaceBuilder({"*.query": "auto", "*": 3}).fit(AdapterCollection.from_pretrained(made.folder))
    assert [bases.n_components for bases in builder.subspace_.values()] == [6, 3]


def test_two_adapters_are_too_few(tmp_path):
    made = make_collection(tmp_path, n_adapters=2, modules=WIDE)
    with pytest.raises(SubspaceError, match="needs 3 with an update, but only 2 have one"):
        SubspaceBuilder("auto").fit(AdapterCollection.from_pretrained(made.folder))


def one_start(folder, *, n_starts, n_adapters):
    """Adapters of a few random starts, which share those and nothing else."""
    starts = [random_factors(modules=WIDE, rank=4, seed=1000 + start) for start in range(n_starts)]
    for i in range(n_adapters):
        own, start = random_factors(modules=WIDE, rank=4, seed=i), starts[i % n_starts]
        write_adapter(folder / f"a{i}", {module: (own[module][0], start[module][1]) for module in WIDE})
    return AdapterCollection.from_pretrained(folder)


@pytest.mark.parametrize("n_starts", [1, 2])
def test_adapters_of_one_start_are_left_out_together(tmp_path, n_starts):
    collection = one_start(tmp_path, n_starts=n_starts, n_adapters=6)
    with pytest.raises(SubspaceError, match=f"the 6 here are of {n_starts} random starts or runs; pass a number"):
        SubspaceBuilder("auto").fit(collection)


def test_other_words_are_refused(tmp_path):
    made = make_collection(tmp_path, n_adapters=3, modules=WIDE)
    with pytest.raises(SubspaceError, match="n_components='best' must be .* or 'auto'"):
        SubspaceBuilder("best").fit(AdapterCollection.from_pretrained(made.folder))


def test_command_line_takes_it():
    assert components(["auto"]) == "auto"
    assert components(["*.query=auto", "*=8"]) == {"*.query": "auto", "*": 8}
