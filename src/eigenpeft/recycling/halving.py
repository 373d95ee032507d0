"""Successive halving: many entrants get few steps, the better half twice as many, until one is left."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

Entrant = TypeVar("Entrant", bound=Hashable)


def first_steps(n_entrants: int, *, max_steps: int, budget: float) -> int:
    """Steps of the first round, so that all rounds together take at most `budget` times `max_steps`.

    A round costs as much as the one before (half of the entrants, twice the steps), at most `ceil(log2 n)` rounds, so
    `steps = budget · max_steps / (n · ceil(log2 n))` (successive halving: Jamieson and Talwalkar, arXiv 1502.07943).

    Args:
        n_entrants: How many start.
        max_steps: Steps of a full training.
        budget: Cost of the rounds together, in full trainings.

    Examples:
        >>> first_steps(16, max_steps=100, budget=3.0)
        4
    """
    rounds = max(1, (n_entrants - 1).bit_length())
    return max(1, min(max_steps, int(budget * max_steps / (n_entrants * rounds))))


def planned_rounds(n_entrants: int, *, steps: int, max_steps: int) -> list[tuple[int, int]]:
    """Entrants and steps of each round, where none is refused and the time suffices.

    Args:
        n_entrants: How many start.
        steps: Steps of the first round.
        max_steps: Steps of a full training.

    Examples:
        >>> planned_rounds(6, steps=4, max_steps=100)
        [(6, 4), (3, 8), (2, 16)]
    """
    rounds = [(n_entrants, steps)]
    while rounds[-1][0] > 2 and rounds[-1][1] < max_steps:
        n, done = rounds[-1]
        rounds.append((-(-n // 2), min(2 * done, max_steps)))
    return rounds


def better_half(scores: Sequence[tuple[Entrant, tuple[float, ...]]]) -> list[Entrant]:
    """The entrants of the highest scores, half of them rounded up, best first; of equal ones those named first.

    Args:
        scores: Entrant and score; scores compare as tuples do.

    Examples:
        >>> better_half([("a", (0.1,)), ("b", (0.3,)), ("c", (0.3,))])
        ['b', 'c']
    """
    ordered = sorted(range(len(scores)), key=lambda i: scores[i][1], reverse=True)  # stable: ties stay in order
    return [scores[i][0] for i in ordered[: -(-len(scores) // 2)]]
