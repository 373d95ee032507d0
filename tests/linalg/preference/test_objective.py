"""The joint objective: stable, its hand-written gradient is autograd's, and the fit finds planted bases."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.linalg.preference.joint import fit_joint, simplex_vertices
from eigenpeft.linalg.preference.objective import (
    JointPrior,
    bradley_terry_nll,
    column_scales,
    joint_gradient,
    simplex,
    simplex_logits,
    simplex_pullback,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n_users=7, n_pairs=40, d=9, n_basis=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "deviations": normal(n_basis, d, seed=seed + 1),
        "user_logits": normal(n_users, n_basis, seed=seed + 2),
        "differences": normal(n_pairs, d, seed=seed + 3),
        "users": torch.randint(n_users, (n_pairs,), generator=generator),
        "offsets": normal(n_pairs, seed=seed + 4),
    }


def by_autograd(deviations, user_logits, *, differences, users, offsets, prior):
    """The objective once more, straight from its formula, differentiated by torch."""
    deviations, user_logits = deviations.clone().requires_grad_(), user_logits.clone().requires_grad_()
    weights = torch.softmax(user_logits, dim=1)
    margins = offsets + torch.einsum("nd,bd,nb->n", differences, deviations, weights[users])
    mean = deviations.mean(dim=0)
    value = -logsigmoid(margins).sum()
    value = value + prior.ridge_shared / 2 * (mean @ mean)
    value = value + prior.ridge_deviation / 2 * sum((row - mean) @ (row - mean) for row in deviations)
    value = value - prior.concentration / len(deviations) * weights.log().sum()
    value.backward()
    return value.item(), deviations.grad, user_logits.grad


@pytest.mark.parametrize("n_basis", [1, 2, 5])
@pytest.mark.parametrize("prior", [JointPrior(0.0, 0.0, 0.0), JointPrior(2.0, 3.0, 0.7)], ids=["flat", "prior"])
def test_hand_written_gradient_is_that_of_autograd(n_basis, prior):
    arguments = problem(n_basis=n_basis)
    found = joint_gradient(**arguments, prior=prior)
    value, for_basis, for_logits = by_autograd(**arguments, prior=prior)
    assert found.value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found.deviations, for_basis, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.user_logits, for_logits, rtol=1e-11, atol=1e-11)


def test_likelihood_does_not_overflow():
    margins = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=torch.float64)
    assert bradley_terry_nll(margins).tolist() == pytest.approx([1e4, 50.0, math.log(2), math.exp(-50), 0.0])


def test_simplex_and_its_inverse_and_pullback():
    logits = normal(4, 5)
    weights = simplex(logits)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(simplex_logits(weights), logits - logits.mean(dim=1, keepdim=True))
    assert torch.isfinite(simplex_logits(torch.tensor([[0.0, 1.0]]))).all()
    direction = normal(4, 5, seed=1)
    jacobian = torch.autograd.functional.vjp(lambda x: torch.softmax(x, dim=-1), logits, direction)[1]
    torch.testing.assert_close(simplex_pullback(weights, direction), jacobian)


def test_column_scales_leave_zero_columns_alone():
    features = torch.tensor([[3.0, 0.0, 1e-3], [-3.0, 0.0, -1e-3]])
    assert column_scales(features).tolist() == pytest.approx([3.0, 1.0, 1e-3])


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
    found = fit(differences, users, max_iter=1000, tolerance=1e-13)
    again = fit(differences, users, max_iter=1000, tolerance=1e-13)
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
