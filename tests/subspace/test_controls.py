"""Controls have the sizes of what they stand beside, and nothing that was learnt there."""

import pytest
import torch

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.subspace import random_subspace
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
