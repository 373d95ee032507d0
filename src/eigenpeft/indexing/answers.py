"""What an index answers: adapters by how near their tasks are, and how sure the first of them is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Below, the answer calls itself a guess; above, sure.
_GUESS, _SURE = 0.5, 0.9


@dataclass(frozen=True)
class Match:
    """One adapter.

    Attributes:
        name: Name of the adapter.
        score: Cosine of the rows' mean embedding with the mean embedding of the adapter's task, after the mean over all tasks
            has been subtracted from both.
        downhill: Cosine of its update with the negative gradient of the rows' loss; None where no gradient was given.
    """

    name: str
    score: float
    downhill: float | None = None


@dataclass(frozen=True, kw_only=True)
class IndexAnswer:
    """The adapters nearest to some rows.

    Attributes:
        matches: The nearest first.
        n_rows: Rows that were asked about.
        probability: How often the first name was right among held-out rows of the index's own tasks with such a lead and as
            many rows; None where the index has too few tasks or rows to tell.
        is_far: Whether the rows have a lower score with the nearest task than 95 % of held-out rows have with their own task.
            Expect True for rows of a task that is not in the index.
    """

    matches: tuple[Match, ...]
    n_rows: int
    probability: float | None
    is_far: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, the nearest first."""
        return tuple(match.name for match in self.matches)

    @property
    def text(self) -> str:
        """The answer in plain words."""
        first = self.matches[0]
        if self.is_far:
            return (
                f"The rows look like none of the tasks in the index; the nearest is {first.name} (cosine {first.score:.2f}). "
                "Held-out rows of a task are more like it than that 19 times out of 20."
            )
        if self.probability is None:
            return (
                f"Nearest is {first.name} (cosine {first.score:.2f}); the index has too few tasks or rows to say how sure that "
                "is."
            )
        how = "Sure" if self.probability >= _SURE else "Likely" if self.probability >= _GUESS else "A guess"
        return (
            f"{how}: {first.name}. Among held-out rows of the index's own tasks with such a lead, the first name was right "
            f"{self.probability:.0%} of the time."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**asdict(self), "matches": [asdict(match) for match in self.matches], "text": self.text}


def with_downhill(matches: tuple[Match, ...], downhill: Mapping[str, float] | None) -> tuple[Match, ...]:
    """Matches with the gradient's cosines beside the scores.

    Args:
        matches: Without them.
        downhill: Adapter to cosine, as `eigenpeft.audit` measures it; None leaves the matches as they are.
    """
    if downhill is None:
        return matches
    return tuple(Match(match.name, match.score, downhill.get(match.name)) for match in matches)
