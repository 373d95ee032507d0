"""The joint objective: stable, and its hand-written gradient is autograd's."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from eigenpeft.linalg.preference.objective import (
    JointPrior,
    batch_prior,
    bradley_terry_nll,
    column_scales,
    dirichlet_penalty,
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


@pytest.mark.parametrize("counts", [0.7, [0.3, 1.0, 2.5]])
def test_penalty_is_the_dirichlet_density_in_the_softmax_basis(counts):
    counts = torch.tensor(counts, dtype=torch.float64)
    weights = normal(5, 3).softmax(dim=1)
    density = torch.distributions.Dirichlet(counts.expand(3)).log_prob(weights) + weights.log().sum(dim=1)
    found = dirichlet_penalty(weights.log(), counts if counts.ndim else float(counts))
    torch.testing.assert_close(found - found[0], density[0] - density)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_batches_of_an_epoch_carry_each_user_s_prior_once(size):
    """Against the sum over users, straight from its formula; batches of any size, the last one smaller."""
    logits, users = normal(5, 3), torch.tensor([0, 1, 1, 2, 2, 2, 3, 4] * 3 + [4] * 36)
    users = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(1))]
    logs, counts = logits.log_softmax(dim=1), torch.bincount(users)
    expected = sum(-0.7 * math.log(weight) for row in logits.softmax(dim=1).tolist() for weight in row)
    batches = users.split(size)
    found = sum(len(rows) * batch_prior(logs[rows], counts[rows], pseudo_count=0.7) for rows in batches)
    assert float(found) == pytest.approx(expected, rel=1e-12)


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
