"""Halving: the cost of all rounds stays within the budget, and the better half stays."""

import pytest

from eigenpeft.recycling.halving import better_half, first_steps


@pytest.mark.parametrize("n_entrants", [1, 2, 3, 7, 16, 19])
@pytest.mark.parametrize("max_steps", [40, 100, 1000])
def test_the_rounds_cost_at_most_the_budget(n_entrants, max_steps):
    steps, left, cost = first_steps(n_entrants, max_steps=max_steps, budget=3.0), n_entrants, 0
    while True:
        cost += left * steps
        left = -(-left // 2)
        if left == 1 or steps >= max_steps:
            break
        steps = min(2 * steps, max_steps)
    # Halves are rounded up, and a round has at least one step.
    assert cost <= 3.0 * max_steps * 1.35 + n_entrants


def test_the_better_half_is_rounded_up_and_in_order():
    assert better_half([("a", (1.0, 0.0)), ("b", (2.0, -1.0)), ("c", (2.0, 0.0))]) == ["c", "b"]
    assert better_half([("a", (0.0,))]) == ["a"]


def test_a_diverged_entrant_comes_last():
    assert better_half([("a", (0.1, -float("inf"))), ("b", (0.1, -3.0))]) == ["b"]
