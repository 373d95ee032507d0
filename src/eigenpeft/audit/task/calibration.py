"""From what an audit measures to the probability that a new task gains: logistic models fitted on collections that were trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenpeft.artifacts.reading import read_json
from eigenpeft.errors import ArtifactError

SHIPPED = Path(__file__).with_name("calibration.json")
# A measure may lie this part of the seen range outside of it before the answer is "unknown".
_SLACK = 0.1
# An interval over fewer cases in which it happened, or did not, is not evidence that a model predicts.
_FEWEST_OF_A_KIND = 10


@dataclass(frozen=True)
class Event:
    """One event and the logistic model of its probability, `1 / (1 + exp(-(Σ_j w_j (x_j - c_j) / s_j + b)))`.

    Attributes:
        event: What is meant, in plain words.
        features: Names of the measures x_j.
        center: c_j.
        scale: s_j.
        weights: w_j.
        intercept: b.
        base_rate: How often it happened among all that was seen.
        points: Mean gain in points of accuracy, and half its 95 % interval, tasks as observations.
        brier: Mean Brier score on collections and tasks that a model was not fitted on.
        base_brier: The same of the base rate of what it was fitted on.
        gain: Mean of `base_brier - brier` and the ends of its 95 % interval, tasks as observations.
        judged: Observations that the scores are over, and how often it happened among them.
    """

    event: str
    features: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    base_rate: float
    points: tuple[float, float]
    brier: float
    base_brier: float
    gain: tuple[float, float, float]
    judged: tuple[int, int]

    @property
    def predicted(self) -> bool:
        """Whether the interval of the gain lies above zero, from ten or more observations with the event and as many without."""
        seen, happened = self.judged
        return self.gain[1] > 0 and min(happened, seen - happened) >= _FEWEST_OF_A_KIND

    def probability(self, measures: Mapping[str, float]) -> float:
        """Probability of the event; the base rate where the model was no better than it.

        Args:
            measures: By name; those of `features` are used.
        """
        if not self.predicted:
            return self.base_rate
        terms = zip(self.features, self.center, self.scale, self.weights, strict=True)
        return 1.0 / (1.0 + math.exp(-(self.intercept + sum(w * (measures[f] - c) / s for f, c, s, w in terms))))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was seen, and a model per event: from the adapters alone, and with rows of the new task.

    Attributes:
        source: How it was made.
        base_models: Base models of the adapters that were seen, without the owner's name.
        n_adapters: Fewest and most adapters of a collection.
        n_collections: Collections.
        n_tasks: New tasks.
        seen: With or without rows of the task ("task", "adapters"): measure to its least and largest value.
        events: The same to the models.
    """

    source: str
    base_models: tuple[str, ...]
    n_adapters: tuple[int, int]
    n_collections: int
    n_tasks: int
    seen: Mapping[str, Mapping[str, tuple[float, float]]]
    events: Mapping[str, tuple[Event, ...]]

    def unseen(self, kind: str, *, measures: Mapping[str, float], base_model: str | None) -> list[str]:
        """Why nothing like this was seen, one reason per line; empty where something was.

        Args:
            kind: "adapters" or "task".
            measures: By name.
            base_model: As the adapters' configs name it.

        Raises:
            KeyError: If there is no such kind, or one of its measures is missing.
        """
        if not self.base_models:
            return ["no collection has been trained for the calibration yet"]
        own = (base_model or "").rstrip("/").rpartition("/")[2].lower()
        if own not in self.base_models:
            return [
                f"the calibration has adapters of {', '.join(self.base_models)} and none of {own or 'an unnamed model'}"
            ]
        reasons = []
        for name, (low, high) in self.seen[kind].items():
            slack, value = _SLACK * (high - low), measures[name]
            if not low - slack <= value <= high + slack:
                reasons.append(f"{_WORDS[name]} is {value:.3g}, and {low:.3g} to {high:.3g} was seen")
        return reasons


_WORDS = {
    "held_out": "the held-out share (log10, K = 8)",
    "adapters": "the number of adapters (log2 of it over 20)",
    "pair_cosine": "the mean cosine of two adapters",
    "rows": "the number of rows (log2 of it over 64)",
    "gradient": "the gradient's share over a random subspace's (log2)",
    "downhill_mean": "the cosine of the mean update with the negative gradient",
    "downhill_best": "the cosine of the best adapter with the negative gradient",
}


def load_calibration(path: Path = SHIPPED) -> Calibration:
    """Read a calibration, as `benchmarks/regimes/calibrate.py` writes it.

    Args:
        path: JSON file; default: the one that ships.

    Raises:
        ArtifactError: If it is missing or no calibration.

    Examples:
        >>> calibration = load_calibration()
        >>> calibration.n_collections > 0, calibration.base_models[0]
        (True, 'all-minilm-l6-v2')
    """
    try:
        data = read_json(path)
        return Calibration(
            source=data["source"],
            base_models=tuple(data["base_models"]),
            n_adapters=tuple(data["n_adapters"]),
            n_collections=data["n_zoos"],
            n_tasks=data["n_tasks"],
            seen={kind: {name: tuple(ends) for name, ends in found.items()} for kind, found in data["seen"].items()},
            events={kind: tuple(map(_event, found)) for kind, found in data["events"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{str(path)!r} is not a calibration ({error}); pass one that benchmarks/regimes/calibrate.py wrote."
        ) from error


def _event(data: Mapping[str, Any]) -> Event:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Event(**values)
