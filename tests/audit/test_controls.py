"""The controls are what their names say."""

import pytest
import torch

from eigenpeft import AdapterCollection, PrincipalSubspace, SubspaceBuilder
from eigenpeft.audit import nearest_adapter
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import ModuleSubspace, mean_only_subspace, shuffled_subspace
from tests.factories import random_factors, write_adapter


def test_shuffled_takes_every_basis_from_another_module(planted):
    subspace = SubspaceBuilder(4).fit(planted()).subspace_
    shuffled = shuffled_subspace(subspace, seed=1)
    assert shuffled == shuffled_subspace(subspace, seed=1)
    taken = []
    for name in subspace:
        matches = [other for other in subspace if subspace[other].components_in is shuffled[name].components_in]
        assert matches
        assert name not in matches
        assert shuffled[name].explained_share == 0
        taken += matches
    assert sorted(taken) == sorted(subspace)


def test_shuffling_needs_a_partner():
    bases = ModuleSubspace(
        torch.eye(2, 4),
        torch.eye(2, 3),
        singular_values_in=torch.ones(2),
        singular_values_out=torch.ones(2),
        explained_variance_ratio=torch.ones(2) / 2,
    )
    with pytest.raises(SubspaceError, match="the only ones of their shape"):
        shuffled_subspace(PrincipalSubspace({"alone": bases}))


@pytest.mark.parametrize("k", [1, 3])
def test_mean_only_is_the_svd_of_the_mean(planted, update, k):
    collection = planted(n_adapters=5)
    subspace = mean_only_subspace(collection, n_components=k, progress=False)
    for module, bases in subspace.items():
        updates = [update(collection, module, name) for name in collection.names]
        mean = sum(delta / delta.norm() for delta in updates) / 5
        u, s, vh = torch.linalg.svd(mean)
        torch.testing.assert_close(bases.singular_values_in.double(), s[:k], rtol=1e-5, atol=1e-6)
        outer = bases.components_in.double() @ vh[:k].mT
        torch.testing.assert_close(outer.abs(), torch.eye(k, dtype=torch.float64), atol=1e-4, rtol=0)
        kept = bases.components_out.double().mT @ bases.components_out.double() @ mean
        torch.testing.assert_close(kept, u[:, :k] * s[:k] @ vh[:k], atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_components", [0, 21])
def test_mean_only_refuses_a_rank_it_has_not(planted, n_components):
    with pytest.raises(SubspaceError, match=f"n_components={n_components} must be between 1 and 20, the largest rank"):
        mean_only_subspace(planted(n_adapters=5), n_components=n_components, progress=False)


def test_nearest_adapter_of_a_disturbed_copy(planted):
    collection = planted(n_adapters=5)
    factors = {}
    for module in collection.modules:
        read = next(read for read in collection.factors(module) if read.adapter == "adapter-3")
        factors[module] = (2.0 * read.lora_B, read.lora_A)
    assert nearest_adapter(collection, factors=factors) == ("adapter-3", pytest.approx(1.0))
    with pytest.raises(SubspaceError, match="0 of its 1 modules are known there"):
        nearest_adapter(collection, factors={"other": factors[collection.modules[0]]})


def test_untrained_adapters_are_near_to_nothing(tmp_path):
    factors = random_factors()
    write_adapter(
        tmp_path / "untrained", {module: (0 * lora_B, lora_A) for module, (lora_B, lora_A) in factors.items()}
    )
    with pytest.raises(
        SubspaceError, match="All 1 adapters .* zero in the 4 common modules.*pass a collection that has"
    ):
        nearest_adapter(AdapterCollection.from_pretrained(tmp_path / "untrained"), factors=factors)
