"""User weights: Newton ends at the optimum that brute force finds; the posterior and the next pair follow from it."""

import pytest
import torch
from scipy.optimize import minimize

from eigenpeft.linalg.preference.users import (
    fit_all_user_weights,
    fit_user_weights,
    laplace_covariance,
    next_pair,
    pad_by_user,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(margins, concentration):
    """The same objective over softmax logits, by SciPy from several starts."""

    def value(logits):
        logs = torch.log_softmax(torch.as_tensor(logits), dim=0)
        return float(-torch.nn.functional.logsigmoid(margins @ logs.exp()).sum() - (concentration * logs).sum())

    starts = [torch.zeros_like(concentration).numpy(), *normal(3, len(concentration), seed=5).numpy()]
    found = min((minimize(value, start, method="BFGS", tol=1e-12) for start in starts), key=lambda run: run.fun)
    return torch.softmax(torch.as_tensor(found.x), dim=0)


@pytest.mark.parametrize("n_basis", [1, 2, 4, 8])
@pytest.mark.parametrize("strength", [0.1, 3.0, 100.0])
def test_newton_ends_where_brute_force_does(n_basis, strength):
    n_users, n_pairs = 6, 7
    margins = strength * normal(n_users, n_pairs, n_basis)
    concentration = torch.linspace(0.1, 0.8, n_basis, dtype=torch.float64)
    present = torch.ones(n_users, n_pairs, dtype=torch.bool)
    found = fit_user_weights(margins, present, concentration=concentration)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(n_users, dtype=torch.float64))
    assert (found > 0).all()
    for weights, z in zip(found, margins, strict=True):
        torch.testing.assert_close(weights, brute_force(z, concentration), atol=2e-4, rtol=1e-3)


def test_no_pairs_give_the_population_and_padding_changes_nothing():
    concentration = torch.tensor([0.2, 0.5, 0.3])
    basis_margins, users = normal(9, 3), torch.tensor([2, 0, 2, 2, 0, 4, 2, 4, 4])
    padded = pad_by_user(basis_margins, users, n_users=6)
    found = fit_user_weights(padded.margins, padded.present, concentration=concentration)
    for empty in (1, 3, 5):
        torch.testing.assert_close(found[empty], concentration.double())
    for user in (0, 2, 4):
        alone = basis_margins[users == user][None]
        one = fit_user_weights(alone, torch.ones(1, alone.shape[1], dtype=torch.bool), concentration=concentration)
        torch.testing.assert_close(found[user], one[0])
    nobody = pad_by_user(normal(0, 3), torch.zeros(0, dtype=torch.long), n_users=2)
    assert fit_user_weights(nobody.margins, nobody.present, concentration=concentration).shape == (2, 3)


def test_contradictory_pairs_pull_to_nowhere():
    """The same pair answered both ways tells nothing about its direction: the optimum stays near the population."""
    z = normal(1, 3)
    margins = torch.cat([z, -z]).repeat(5, 1)[None]
    concentration = torch.tensor([5.0, 5.0, 5.0])
    found = fit_user_weights(margins, torch.ones(1, 10, dtype=torch.bool), concentration=concentration)
    population = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert abs(float(z @ found[0])) < abs(float(z @ population)) + 1e-9


def test_many_pairs_find_the_users_weights():
    weights = torch.tensor([0.7, 0.05, 0.25], dtype=torch.float64)
    z = 4 * normal(20_000, 3)
    answers = torch.bernoulli(torch.sigmoid(z @ weights), generator=torch.Generator().manual_seed(3)) * 2 - 1
    margins = (z * answers[:, None])[None]
    present = torch.ones(1, len(z), dtype=torch.bool)
    concentration = torch.full((3,), 0.3)
    found = fit_user_weights(margins, present, concentration=concentration)
    assert (found[0] - weights).abs().max() < 0.02
    spread = laplace_covariance(found, margins, present, concentration=concentration)[0].diagonal().sqrt()
    assert ((found[0] - weights).abs() < 4 * spread).all()


def test_covariance_is_the_inverse_curvature_in_the_plane():
    n_basis = 4
    margins, concentration = normal(3, 6, n_basis), torch.full((n_basis,), 0.6, dtype=torch.float64)
    present = torch.ones(3, 6, dtype=torch.bool)
    weights = fit_user_weights(margins, present, concentration=concentration)
    covariance = laplace_covariance(weights, margins, present, concentration=concentration)
    plane = torch.linalg.svd(torch.ones(1, n_basis, dtype=torch.float64)).Vh[1:]
    for w, z, found in zip(weights, margins, covariance, strict=True):

        def value(point, z=z):
            return -torch.nn.functional.logsigmoid(z @ point).sum() - (concentration * point.log()).sum()

        hessian = torch.autograd.functional.hessian(value, w)
        torch.testing.assert_close(found, plane.mT @ torch.linalg.inv(plane @ hessian @ plane.mT) @ plane)
        torch.testing.assert_close(found.sum(dim=1), torch.zeros(n_basis, dtype=torch.float64), atol=1e-10, rtol=0)


def test_next_pair_prefers_what_is_unknown():
    weights = torch.tensor([0.5, 0.5])
    covariance = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    candidates = torch.tensor([[1.0, 1.0], [0.1, -0.1], [2.0, -2.0], [20.0, 20.0]])
    assert next_pair(weights, covariance, candidates=candidates).tolist()[:2] == [2, 1]


def test_the_next_pair_teaches_more_than_a_random_one():
    concentration = torch.full((3,), 1 / 3)
    truth = torch._sample_dirichlet(
        torch.full((60, 3), 0.3, dtype=torch.float64), generator=torch.Generator().manual_seed(0)
    )
    chosen_errors, random_errors = [], []
    for user, weights in enumerate(truth):
        pool = 3 * normal(200, 3, seed=user)
        answers = torch.sign(pool @ weights)
        for errors, choose in ((chosen_errors, True), (random_errors, False)):
            asked: list[int] = []
            for _ in range(6):
                z = (pool * answers[:, None])[asked][None]
                present = torch.ones(1, len(asked), dtype=torch.bool)
                now = fit_user_weights(z, present, concentration=concentration)
                covariance = laplace_covariance(now, z, present, concentration=concentration)[0]
                order = next_pair(now[0], covariance, candidates=pool).tolist() if choose else range(200)
                asked.append(next(i for i in order if i not in asked))
            z = (pool * answers[:, None])[asked][None]
            final = fit_user_weights(z, torch.ones(1, 6, dtype=torch.bool), concentration=concentration)
            errors.append(float((final[0] - weights).abs().sum()))
    assert sum(chosen_errors) < 0.9 * sum(random_errors)


@pytest.mark.parametrize("block_numbers", [1, 60, 10**9])
def test_blocks_change_nothing(block_numbers):
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(30, (200,), generator=generator)
    basis_margins, concentration = 3 * normal(200, 4), torch.full((4,), 0.25)
    found = fit_all_user_weights(
        basis_margins, users, n_users=32, concentration=concentration, block_numbers=block_numbers
    )
    padded = pad_by_user(basis_margins, users, n_users=32)
    torch.testing.assert_close(
        found, fit_user_weights(padded.margins, padded.present, concentration=concentration), atol=1e-5, rtol=1e-5
    )
