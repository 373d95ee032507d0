"""Successive halving beside a control: many rivals get few steps, the better half twice as many, until one is left."""

import math
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import TypeVar

from eigenpeft.linalg.scores.intervals import mean_error

Entrant = TypeVar("Entrant", bound=Hashable)


def round_sizes(n_entrants: int, *, has_control: bool) -> list[int]:
    """How many are trained in each round: the rivals are halved until one is left, and the control stays in every round.

    Args:
        n_entrants: How many start, the control among them.
        has_control: Whether there is one.

    Examples:
        >>> round_sizes(8, has_control=True), round_sizes(8, has_control=False)
        ([8, 4, 2], [8, 4, 2])
        >>> round_sizes(6, has_control=True), round_sizes(1, has_control=True)
        ([6, 3, 2], [1])
    """
    rivals, sizes = n_entrants - has_control, [n_entrants]
    while rivals > 1:
        rivals //= 2
        if rivals + has_control > 1:
            sizes.append(rivals + has_control)
    return sizes


def first_steps(n_entrants: int, *, max_steps: int, budget: float, has_control: bool, n_before: int = 0) -> int:
    """Steps of the first round, so that all rounds together take at most `budget` times `max_steps`.

    With twice the steps in each round, `Σ_i n_i 2^i` short trainings are paid (successive halving: Jamieson and Talwalkar, arXiv
    1502.07943).

    Args:
        n_entrants: How many start.
        max_steps: Steps of a full training.
        budget: Cost of the rounds together, in full trainings.
        has_control: Whether one of them stays in every round.
        n_before: Short trainings before the rounds, which count.

    Examples:
        >>> first_steps(8, max_steps=120, budget=3.0, has_control=True)
        15
    """
    sizes = round_sizes(n_entrants, has_control=has_control)
    cost = n_before + sum(size * 2**i for i, size in enumerate(sizes))
    return max(1, min(max_steps, int(budget * max_steps / cost)))


def planned_rounds(n_entrants: int, *, steps: int, max_steps: int, has_control: bool) -> list[tuple[int, int]]:
    """Entrants and steps of each round, where none is refused and the time suffices.

    Args:
        n_entrants: How many start.
        steps: Steps of the first round.
        max_steps: Steps of a full training.
        has_control: Whether one of them stays in every round.

    Examples:
        >>> planned_rounds(6, steps=4, max_steps=100, has_control=True)
        [(6, 4), (3, 8), (2, 16)]
    """
    sizes = round_sizes(n_entrants, has_control=has_control)
    planned = [(size, min(steps * 2**i, max_steps)) for i, size in enumerate(sizes)]
    full = [i for i, (_, each) in enumerate(planned) if each == max_steps]
    return planned[: full[0] + 1] if full else planned


def better_half(losses: Sequence[tuple[Entrant, float]]) -> list[Entrant]:
    """Half of the entrants, rounded down and at least one, those of the smallest losses; of equal ones those named first.

    Args:
        losses: Entrant and loss.

    Examples:
        >>> better_half([("a", 0.9), ("b", 0.3), ("c", 0.3)])
        ['b']
    """
    ordered = sorted(range(len(losses)), key=lambda i: losses[i][1])  # stable: ties stay in order
    return [losses[i][0] for i in ordered[: max(1, len(losses) // 2)]]


def paired_lead(losses: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """By how much a loss is below the control's on the same rows: mean difference and its standard error.

    Args:
        losses: Loss on each row.
        control: The control's loss on each row, in the same order.

    Returns:
        `(mean, standard error)`; the error is infinite below two rows, or where a loss is not finite.

    Examples:
        >>> mean, error = paired_lead([0.1, 0.3, 0.2], [0.3, 0.4, 0.5])
        >>> round(mean, 3), round(error, 3)
        (0.2, 0.058)
    """
    gaps = [theirs - ours for ours, theirs in zip(losses, control, strict=True)]
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return (fmean(gaps) if gaps else 0.0), math.inf
    return fmean(gaps), mean_error(gaps)
