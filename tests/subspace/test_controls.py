"""Controls have the sizes of what they stand beside, and nothing that was learnt there."""

import pytest
import torch

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.subspace import random_subspace, shuffled_subspace
from tests.factories import make_collection


@pytest.fixture
def subspace(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules={"0.q": (30, 40), "1.q": (30, 40), "2.q": (30, 40)})
    return SubspaceBuilder(5, n_pseudo_components=1).fit(AdapterCollection.from_pretrained(made.folder)).subspace_


def test_a_random_subspace_has_the_sizes_and_no_direction(subspace):
    control = random_subspace(like=subspace, seed=1)
    for name, bases in subspace.items():
        other = control[name]
        assert (other.n_components, other.out_features) == (bases.n_components, bases.out_features)
        torch.testing.assert_close(other.components_in @ other.components_in.mT, torch.eye(6))
        # Chance: the mean squared cosine with a subspace of 6 of 40 dimensions is 6 / 40.
        assert principal_angles(other.components_in, bases.components_in).cos().square().mean() < 0.35
    assert control.fingerprint == random_subspace(like=subspace, seed=1).fingerprint
    assert control.fingerprint != random_subspace(like=subspace, seed=2).fingerprint


def test_a_shuffled_subspace_moves_every_basis_to_another_module(subspace):
    control = shuffled_subspace(like=subspace)
    given = {name: bases.components_in for name, bases in subspace.items()}
    sources = {
        name: next(other for other, components in given.items() if torch.equal(components, bases.components_in))
        for name, bases in control.items()
    }
    assert sorted(sources.values()) == sorted(given)
    assert all(name != source for name, source in sources.items())


def test_a_shape_of_its_own_cannot_be_shuffled(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules={"0.q": (30, 40), "0.v": (20, 40)})
    built = SubspaceBuilder(5).fit(AdapterCollection.from_pretrained(made.folder)).subspace_
    with pytest.raises(SubspaceError, match="2 modules, such as '0.q'"):
        shuffled_subspace(like=built)
