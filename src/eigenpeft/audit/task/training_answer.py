"""The second answer: will a new task gain over LoRA by starting from these adapters, and with what probability."""

import math
from collections.abc import Mapping, Sequence

from eigenpeft.audit.answers import Chance, Train
from eigenpeft.audit.task.calibration import Calibration
from eigenpeft.audit.task.gradient import GradientShare
from eigenpeft.audit.task.reuse import Downhill

# Of a held-out share, before its logarithm: chance and rounding lie below.
_LEAST_SHARE = 1e-4
_LIKELY, _UNLIKELY = 0.7, 0.3
# The number of components at which the calibration reads held-out and gradient shares.
CALIBRATED_N_COMPONENTS = 8


def measures_of_adapters(
    held_out: Sequence[float], chance: Sequence[float], similarity: Sequence[Sequence[float]], *, n_rows: int
) -> dict[str, float]:
    """What the calibration reads off the adapters alone.

    Args:
        held_out: Shares for K = 1, 2, ...
        chance: The same of the null.
        similarity: (n, n) mean cosines of ΔW.
        n_rows: Training rows of the new task.
    """
    n, at = len(similarity), min(CALIBRATED_N_COMPONENTS, len(held_out)) - 1
    return {
        "held_out": math.log10(max(held_out[at] - chance[at], _LEAST_SHARE)),
        "adapters": math.log2(n / 20),
        "pair_cosine": (sum(map(sum, similarity)) - n) / (n * (n - 1)),
        "rows": math.log2(n_rows / 64),
    }


def measures_of_task(gradient: GradientShare, found: Downhill) -> dict[str, float]:
    """What it reads off a new task's rows beside the adapters.

    Args:
        gradient: Share of the task's gradient in the adapters' subspace.
        found: How far the updates point downhill.
    """
    at = min(CALIBRATED_N_COMPONENTS, len(gradient.curve)) - 1
    return {
        "gradient": math.log2(max(gradient.curve[at], 1e-12) / max(gradient.random_curve[at], 1e-12)),
        "downhill_mean": found.mean,
        "downhill_best": max(found.adapters.values()),
    }


def train_answer(
    calibration: Calibration, measures: Mapping[str, float], *, base_model: str | None, n_rows: int, with_task: bool
) -> Train:
    """The probabilities of the calibration's events, or "unknown" where it has seen nothing like this.

    Args:
        calibration: Models and what they were fitted on.
        measures: Measures of the adapters and, where `with_task`, of the task.
        base_model: As the adapters' configs name it.
        n_rows: Training rows of the new task.
        with_task: Whether rows of the task were looked at.
    """
    kind = "task" if with_task else "adapters"
    events = calibration.events[kind]
    unseen = calibration.unseen(kind, measures=measures, base_model=base_model)
    task = "this task" if with_task else "a new task of the same kind as theirs"
    if unseen:
        chances = tuple(
            Chance(
                event=event.event,
                probability=None,
                base_rate=event.base_rate,
                points=event.points,
                predicted=event.predicted,
            )
            for event in events
        )
        text = (
            f"Unknown. Nothing like these adapters was seen: {'; '.join(unseen)}. Train a LoRA and EigenLoRA on the same rows "
            "and compare them on others, which eigenpeft recycle does."
        )
        return Train(answer="unknown", text=text, n_rows=n_rows, with_task=with_task, chances=chances)
    chances = tuple(
        Chance(
            event=event.event,
            probability=event.probability(measures),
            base_rate=event.base_rate,
            points=event.points,
            predicted=event.predicted,
        )
        for event in events
    )
    # The word is about LoRA; being ahead of the head alone or of random directions is not a reason to recycle.
    over_lora = [chance for chance in chances if "LoRA" in chance.event.partition("ahead of")[2]] or list(chances)
    best = max(chance.probability or 0.0 for chance in over_lora)
    answer = "likely" if best >= _LIKELY else "unlikely" if best <= _UNLIKELY else "open"
    told = "; ".join(
        f"{chance.event}, {chance.probability:.0%} (on average {chance.points[0]:+.1f} ± {chance.points[1]:.1f} points)"
        for chance in chances
    )
    blind = [chance.event for chance in chances if not chance.predicted]
    caveat = ""
    if blind:
        named = "these" if len(blind) == len(chances) else ", ".join(blind)
        caveat = f" For {named} nothing that was measured predicts better than how often it happened, and that is the figure."
    return Train(
        answer=answer,
        text=f"{answer.capitalize()}. Probabilities for {task} with {n_rows} rows: {told}.{caveat}",
        n_rows=n_rows,
        with_task=with_task,
        chances=chances,
    )
