"""Before anything is trained: which candidates the budget reaches, with how many steps, and a line that says so."""

from collections.abc import Callable, Mapping, Sequence

from eigenpeft.recycling.candidates import CANDIDATES, CONTROL, NEAREST
from eigenpeft.recycling.halving import first_steps, planned_rounds
from eigenpeft.recycling.preparing import SCALES

# A first round of fewer steps than this share of `max_steps` says nothing; entrants that would make it so are not tried. Without a
# new head, which learns what an answer looks like for all of them alike, a start that knows it is ahead for longer.
_LEAST_SHARE, _LEAST_SHARE_WITHOUT_HEAD = 0.2, 0.4


def entrants_within(
    learning_rates: Mapping[str, Sequence[float]], *, max_steps: int, budget: float, has_head: bool
) -> tuple[list[tuple[str, float]], int]:
    """As many candidates with their rates as the budget reaches, the control first, and the steps of their first round.

    Args:
        learning_rates: Candidate to its rates, in the order in which they are tried where the budget is small.
        max_steps: Steps of a full training.
        budget: Cost of everything before the last training, in full trainings.
        has_head: Whether the task has a new head, which λ and the nearest adapter are looked for behind.
    """
    ordered = sorted(learning_rates, key=lambda name: name != CONTROL)
    most = max(len(rates) for rates in learning_rates.values())
    every = [(name, learning_rates[name][i]) for i in range(most) for name in ordered if i < len(learning_rates[name])]
    least = int((_LEAST_SHARE if has_head else _LEAST_SHARE_WITHOUT_HEAD) * max_steps)
    while True:
        steps = first_steps(
            len(every),
            max_steps=max_steps,
            budget=budget,
            has_control=every[0][0] == CONTROL,
            n_before=_n_before([name for name, _ in every], has_head=has_head),
        )
        if steps >= least or len(every) <= 2:
            return every, steps
        every.pop()


def _n_before(names: Sequence[str], *, has_head: bool) -> int:
    """Short trainings before the rounds: of a new head one for each λ, and one to find the nearest adapter.

    Without a head each λ is judged as it is; the gradient that finds the nearest adapter is counted as a training.
    """
    return len(SCALES) * (has_head and any(CANDIDATES[name].merged for name in names)) + (NEAREST in names)


def announce(
    entrants: Sequence[tuple[str, float]], *, steps: int, max_steps: int, has_head: bool, say: Callable[[str], None]
) -> int:
    """Say what is going to be trained; returns the steps of all of it.

    Args:
        entrants: Candidates with their rates, the control first.
        steps: Steps of the first round.
        max_steps: Steps of a full training.
        has_head: As in `entrants_within`.
        say: Called with the line.
    """
    candidates = list(dict.fromkeys(name for name, _ in entrants))
    first, has_control = _n_before(candidates, has_head=has_head), entrants[0][0] == CONTROL
    rounds = planned_rounds(len(entrants), steps=steps, max_steps=max_steps, has_control=has_control)
    parts = [f"{first} short training{'s' * (first > 1)} to prepare"] if first else []
    parts += [f"{n} trials of {each} steps" for n, each in rounds]
    say(f"{len(candidates)} candidates: {', '.join(parts)}, and one training of {max_steps} steps on all rows.")
    return first * steps + sum(n * each for n, each in rounds) + max_steps
