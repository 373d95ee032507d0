"""The joint fit finds planted bases, at a stationary point, whatever the scale of the columns."""

import pytest
import torch

from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.linalg.preference.joint import fit_joint, simplex_vertices
from eigenpeft.linalg.preference.objective import JointPrior, joint_gradient


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n_basis", [2, 3, 6])
def test_vertices_are_a_regular_simplex(n_basis):
    vertices = simplex_vertices(n_basis, generator=torch.Generator().manual_seed(0))
    gram = vertices @ vertices.mT
    expected = torch.full_like(gram, -1 / (n_basis - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(gram, expected)
    torch.testing.assert_close(vertices.sum(dim=0), torch.zeros(n_basis - 1, dtype=torch.float64), atol=1e-12, rtol=0)


def planted(n_users=300, n_pairs=60, d=24, n_basis=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    basis = 4 * normal(n_basis, d, seed=seed + 1)
    weights = torch._sample_dirichlet(torch.full((n_users, n_basis), 0.3, dtype=torch.float64), generator=generator)
    users = torch.arange(n_users).repeat_interleave(n_pairs)
    differences = normal(len(users), d, seed=seed + 2) / d**0.5 * 2
    margins = ((differences @ basis.mT) * weights[users]).sum(dim=1)
    chosen = torch.bernoulli(torch.sigmoid(margins), generator=generator) * 2 - 1
    return (differences * chosen[:, None]).to(dtype), users, basis, weights


def fit(differences, users, *, seed=0, n_basis=3, **options):
    return fit_joint(
        differences,
        users,
        n_users=int(users.max()) + 1,
        n_basis=n_basis,
        offsets=torch.zeros(len(differences), dtype=differences.dtype),
        prior=JointPrior(5.0, 1.0, 1.0),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def test_planted_basis_is_recovered():
    differences, users, basis, _ = planted()
    found = fit(differences, users, max_iter=300)
    assert found.converged
    random = principal_angles(normal(3, 24, seed=9), basis).max()
    assert principal_angles(found.deviations, basis).max() < 0.25 < random


def test_fit_is_stationary_and_the_same_by_seed():
    differences, users, _, _ = planted(n_users=40, n_pairs=20)
    found = fit(differences, users, max_iter=1000, tol=1e-13)
    again = fit(differences, users, max_iter=1000, tol=1e-13)
    assert torch.equal(found.deviations, again.deviations)
    gradient = joint_gradient(
        found.deviations,
        found.user_logits,
        differences=differences,
        users=users,
        offsets=torch.zeros(len(users), dtype=torch.float64),
        prior=JointPrior(5.0, 1.0, 1.0),
    )
    assert gradient.deviations.abs().max() < 1e-2
    assert gradient.user_logits.abs().max() < 1e-2
    assert not torch.equal(found.deviations, fit(differences, users, seed=1).deviations)


def test_fit_does_not_stall_on_columns_of_unequal_scale():
    """Without the preconditioner the steep columns alone move within the iterations allowed."""
    differences, users, _, _ = planted(n_users=40, n_pairs=20)
    stretch = torch.logspace(-2, 2, differences.shape[1], dtype=torch.float64)
    options = {"prior": JointPrior(1e-9, 1e-9, 1.0), "n_users": 40, "n_basis": 1}
    results = [
        fit_joint(
            x, users, offsets=torch.zeros(len(users), dtype=torch.float64), generator=torch.Generator(), **options
        ).value
        for x in (differences, differences * stretch)
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("n_users", [1, 2])
def test_fewer_users_than_basis_rows(n_users):
    differences, users, _, _ = planted(n_users=n_users, n_pairs=30)
    found = fit(differences, users, n_basis=4)
    assert found.deviations.shape == (4, 24)
    assert torch.isfinite(found.deviations).all()


def test_float32_ends_where_float64_does():
    differences, users, _, _ = planted(n_users=60, n_pairs=30)
    single, double = fit(differences.float(), users, max_iter=300), fit(differences, users, max_iter=300)
    assert single.deviations.dtype == torch.float32
    assert single.value == pytest.approx(double.value, rel=2e-3)
