"""Student's quantiles against tables, and the coverage that the expanded interval has and the plain one lacks."""

import pytest
import torch

from eigenpeft.linalg.scores.intervals import expanded_tail, student_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (5000, 1.9600)],
)
def test_quantiles_are_those_of_tables(degrees, expected):
    assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-4)


def test_few_observations_are_covered_as_often_as_the_interval_says():
    generator = torch.Generator().manual_seed(0)
    n, n_trials, n_draws = 6, 600, 400
    values = torch.randn(n_trials, n, generator=generator, dtype=torch.float64)
    drawn = torch.randint(n, (n_trials, n_draws, n), generator=generator)
    means = values[:, None].expand(-1, n_draws, -1).gather(2, drawn).mean(dim=2)
    covered = {}
    for tail in (0.025, expanded_tail(n)):
        low, high = means.quantile(tail, dim=1), means.quantile(1 - tail, dim=1)
        covered[tail] = float(((low <= 0) & (high >= 0)).double().mean())
    assert covered[0.025] < 0.9
    assert covered[expanded_tail(n)] > 0.92
