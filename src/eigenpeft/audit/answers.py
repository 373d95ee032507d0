"""The audit's three answers, compress, train and reuse, as frozen plain data."""

from dataclasses import dataclass
from typing import Literal

CORE_NAMES = {"full": "full", "diagonal": "paired", "truncated": "LoRA cut to rank K"}
"""What tables call the cores of the first answer: K² numbers per module, K on paired directions, or the control."""


@dataclass(frozen=True, kw_only=True)
class CompressRow:
    """One way to keep these adapters in fewer numbers.

    Attributes:
        core: "full" (K² numbers per module) on balanced bases, or "diagonal" (K) on paired directions; or "truncated", the control
            without a subspace: each LoRA cut to a lower rank on its own.
        n_components: K, or that rank.
        n_parameters: Numbers per adapter, over all modules.
        kept_share: Share of ‖ΔW‖², mean over modules.
        relative_error: Relative error of ΔW, `sqrt(1 - kept_share)`.
        ratio: Numbers of the bases and of all adapters in them, over the numbers of the plain LoRAs.
    """

    core: str
    n_components: int
    n_parameters: int
    kept_share: float
    relative_error: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Compress:
    """May these adapters be kept in fewer numbers?

    Attributes:
        answer: "yes", or "no" where nothing that keeps enough is smaller.
        text: The answer in plain words.
        n_lora_parameters: Numbers of one plain LoRA, mean over the adapters.
        rows: Error against numbers, by K.
    """

    answer: Literal["yes", "no"]
    text: str
    n_lora_parameters: int
    rows: tuple[CompressRow, ...]


@dataclass(frozen=True, kw_only=True)
class Chance:
    """The probability of one event.

    Attributes:
        event: What is meant, such as "EigenLoRA K 8 ahead of a LoRA of as many numbers".
        probability: Its probability; None where the calibration has seen nothing like these adapters.
        base_rate: How often it happened in the calibration, whatever the audit said.
        points: Mean gain over the calibration's new tasks, in points of accuracy, and half its 95 % interval.
        predicted: Whether the calibration did better than the base rate on collections and tasks that it was not fitted on; where
            not, the probability is the base rate.
    """

    event: str
    probability: float | None
    base_rate: float
    points: tuple[float, float]
    predicted: bool


@dataclass(frozen=True, kw_only=True)
class Train:
    """Will a new task gain by starting from these adapters?

    Attributes:
        answer: "likely", "open", "unlikely", or "unknown" where nothing like these adapters was seen.
        text: The answer in plain words.
        n_rows: Training rows of the new task that it is for.
        with_task: Whether rows of the task were looked at; without them it is for a task of the same kind as the adapters'.
        chances: By event.
    """

    answer: Literal["likely", "open", "unlikely", "unknown"]
    text: str
    n_rows: int
    with_task: bool
    chances: tuple[Chance, ...]


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Which adapter is nearest to the new task?

    Attributes:
        answer: "yes" (at least one points further downhill than chance), "no", or "not asked" where no rows were given.
        text: The answer in plain words.
        nearest: Names and cosines of the update with the negative gradient, the largest first.
        mean: The same cosine of the mean update; None where no rows were given.
        chance: Cosine that the best of as many random updates of their sizes exceeds once in 20 draws; None where no rows were
            given, or in a report of an earlier version.
    """

    answer: Literal["yes", "no", "not asked"]
    text: str
    nearest: tuple[tuple[str, float], ...]
    mean: float | None
    chance: float | None = None
