"""Halving: the cost of all rounds stays within the budget, the better half stays, and leads are of the same rows."""

import math

import numpy as np
import pytest

from eigenpeft.recycling.candidates import default_candidates, learning_rates_of
from eigenpeft.recycling.halving import better_half, first_steps, paired_lead, planned_rounds
from eigenpeft.recycling.planning import announce, entrants_within


@pytest.mark.parametrize("n_before", [0, 5])
@pytest.mark.parametrize("has_control", [True, False])
@pytest.mark.parametrize("n_entrants", [1, 2, 3, 7, 8, 16, 19])
@pytest.mark.parametrize("max_steps", [40, 100, 1000])
def test_the_rounds_cost_at_most_the_budget(n_entrants, max_steps, has_control, n_before):
    settings = {"max_steps": max_steps, "has_control": has_control}
    steps = first_steps(n_entrants, budget=3.0, n_before=n_before, **settings)
    planned = planned_rounds(n_entrants, steps=steps, **settings)
    cost = n_before * steps + sum(n * each for n, each in planned)
    assert cost <= 3.0 * max_steps or steps == 1  # a round has at least one step
    assert planned[0] == (n_entrants, steps)
    assert all(each <= max_steps for _, each in planned)
    assert planned[-1][0] <= 2 + (not has_control) or planned[-1][1] == max_steps


@pytest.mark.parametrize(("task_type", "first", "n_before"), [("SEQ_CLS", 25, 4), ("CAUSAL_LM", 42, 0)])
def test_a_short_training_that_is_not_needed_is_not_paid_for(task_type, first, n_before):
    names, has_head = default_candidates(task_type), task_type == "SEQ_CLS"
    rates = learning_rates_of(names, task_type=task_type)
    entrants, steps = entrants_within(rates, max_steps=100, budget=3.0, has_head=has_head)
    assert entrants == [(name, rates[name][0]) for name in names[: 4 if has_head else 3]]
    assert steps == first
    said = []
    total = announce(entrants, steps=steps, max_steps=100, has_head=has_head, say=said.append)
    assert total == (n_before + len(entrants) + 2 * 2) * steps + 100
    assert ("4 short trainings to prepare" in said[0]) == has_head


def test_the_better_half_is_rounded_down_and_in_order():
    assert better_half([("a", 1.0), ("b", 0.5), ("c", 0.2), ("d", 0.2), ("e", 0.9)]) == ["c", "d"]
    assert better_half([("a", 0.0)]) == ["a"]


def test_a_diverged_entrant_comes_last():
    assert better_half([("a", math.inf), ("b", 3.0)]) == ["b"]


def test_a_lead_is_that_of_the_pairs():
    generator = np.random.default_rng(0)
    hard = generator.exponential(2.0, 40)  # rows differ far more than the two candidates do
    ours, theirs = hard + generator.normal(0, 0.1, 40), hard + 0.2 + generator.normal(0, 0.1, 40)
    mean, error = paired_lead(ours.tolist(), theirs.tolist())
    gaps = theirs - ours
    assert mean == pytest.approx(gaps.mean())
    assert error == pytest.approx(gaps.std(ddof=1) / 40**0.5)
    assert mean > 5 * error
    assert paired_lead(theirs.tolist(), ours.tolist())[0] == pytest.approx(-mean)


def test_too_few_or_diverged_rows_give_no_certainty():
    assert paired_lead([0.1], [0.5]) == (pytest.approx(0.4), math.inf)
    assert paired_lead([0.1, 0.1], [0.5, math.inf])[1] == math.inf
    assert paired_lead([], []) == (0.0, math.inf)
    with pytest.raises(ValueError, match="shorter|longer"):
        paired_lead([0.1], [0.1, 0.2])
