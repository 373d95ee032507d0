"""What `recycle` tried and found, as frozen plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eigenpeft.errors import ArtifactError
from eigenpeft.linalg.scores.intervals import share_error

_EARLIER_NAMES = {"rate": "learning_rate", "numbers": "n_parameters"}  # before 0.1.0


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their names of today."""
    return {_EARLIER_NAMES.get(name, name): value for name, value in data.items()}


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of one candidate, judged on held-out rows.

    Attributes:
        candidate: Name, a key of `CANDIDATES`.
        learning_rate: Learning rate of the adapter.
        steps: Optimizer steps.
        scale: λ of a merged start; None where there is none.
        score: Accuracy of a classifier; minus the loss of everything else. Higher is better.
        loss: Mean loss on the held-out rows.
        n_parameters: Trained values beside the head.
        seconds: Seconds of training and judging.
        losses: Loss on each held-out row.
        nearest: The adapter that `nearest_continued` starts at; None for the others.
    """

    candidate: str
    learning_rate: float
    steps: int
    scale: float | None
    score: float
    loss: float
    n_parameters: int
    seconds: float
    losses: tuple[float, ...] = ()
    nearest: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "losses", tuple(self.losses))  # JSON has lists

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trial":
        """The trial that `dataclasses.asdict` gave, also after JSON.

        Args:
            data: One line of `trials.jsonl`, or an entry of a report's `trials`.

        Raises:
            TypeError: If fields are missing or unknown.
        """
        return cls(**_renamed(data))


@dataclass(frozen=True)
class FinalScore:
    """One trained model on rows that were used for nothing else.

    Attributes:
        name: Candidate, "head alone" or "base model".
        learning_rate: Its learning rate; None for the base model.
        score: Accuracy of a classifier; minus the loss of everything else.
        error: Standard error of that over rows; None where it cannot be known.
        loss: Mean loss.
        lead: By how much the result's score is above this one's on the same rows, and the standard error; None for the result.
    """

    name: str
    learning_rate: float | None
    score: float
    error: float | None
    loss: float
    lead: tuple[float, float | None] | None = None

    def __post_init__(self):
        object.__setattr__(self, "lead", None if self.lead is None else tuple(self.lead))  # JSON has lists


@dataclass(frozen=True, kw_only=True)
class RecycleReport:
    """The whole run.

    Attributes:
        winner: Name of the candidate that was trained on all rows.
        learning_rate: Its learning rate.
        steps: Its steps.
        score: Its score in the last round it was judged in.
        control: Score of the fresh LoRA r 8 in its last round, and the steps; None where none was tried.
        trials: All that this result rests on, in order, also those of an earlier run into the same folder.
        refused: Candidates that could not be tried, and why.
        n_train: Rows that trials were trained on.
        n_held_out: Rows that they were judged on.
        seconds: Seconds of everything.
        stopped: Whether the time limit ended the rounds early.
        majority: Share of the held-out rows that have the commonest label; None where rows have no whole labels.
        rival: The best candidate beside the fresh LoRA in the last round; None where there was no such pair.
        lead: By how much the rival's loss was below the fresh LoRA's on the same rows, and the standard error of that.
        skipped: Candidates that the budget did not reach.
        candidates: What was asked for, in order; empty in reports of older versions.
        learning_rates: Candidate to the learning rates that were to be tried; empty in reports of older versions.
        rank: Rank of the LoRA that was written; None in reports of older versions.
        n_bytes: Size of its weights file, head included; None in reports of older versions.
        tested: The result, a fresh LoRA r 8 and the head alone (or the base model) on test rows, where there were some.
        n_test: Test rows.
        n_test_seen: Test rows that are among the others too, word for word.
        budget: Cost of everything before the last training that was allowed, in full trainings; None in reports of older versions.
    """

    winner: str
    learning_rate: float
    steps: int
    score: float
    control: tuple[float, int] | None
    trials: tuple[Trial, ...]
    refused: dict[str, str]
    n_train: int
    n_held_out: int
    seconds: float
    stopped: bool
    majority: float | None = None
    rival: str | None = None
    lead: tuple[float, float] | None = None
    skipped: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    budget: float | None = None
    rank: int | None = None
    n_bytes: int | None = None
    tested: tuple[FinalScore, ...] = ()
    n_test: int = 0
    n_test_seen: int = 0

    @property
    def is_at_chance(self) -> bool:
        """Whether no trial did better than the commonest label for every row, by two standard errors of that share."""
        return self.majority is not None and max(trial.score for trial in self.trials) <= self.majority + self._margin

    @property
    def _margin(self) -> float:
        return 2 * share_error(self.majority or 0.0, self.n_held_out)

    def is_ranked(self, trial: Trial) -> bool:
        """Whether a trial is one of the rounds; the others were for λ of the merged start.

        Args:
            trial: One of `trials`.
        """
        return trial.candidate not in self.skipped and trial.candidate in (self.candidates or (trial.candidate,))

    @property
    def decisive(self) -> Trial:
        """The winner's last trial, which the choice rests on."""
        own = [trial for trial in self.trials if trial.candidate == self.winner]
        same = [trial for trial in own if (trial.learning_rate, trial.score) == (self.learning_rate, self.score)]
        return (same or own)[-1]

    def _held_out(self, trial: Trial) -> str:
        """Loss of a trial, and its score where that is something else."""
        return f"{trial.loss:.3f}" + ("" if self.majority is None else f" (score {trial.score:.3f})")

    @property
    def text(self) -> str:
        """The end in plain words."""
        return " ".join(part for part in (self._choice, self._test) if part)

    @property
    def _test(self) -> str:
        """Scores on the test rows."""
        if not self.tested:
            return ""
        parts = []
        is_loss = self.majority is None
        for number, each in enumerate(self.tested):
            name = "a fresh LoRA r 8" if each.name == "lora_r8" else f"the {each.name}"
            name = name if number else f"the result ({each.name})"
            parts.append(f"{name} {_with_error(-each.score if is_loss else each.score, each.error)}{_compared(each)}")
        what = "loss" if is_loss else "accuracy"
        seen = f" {self.n_test_seen} of the test rows are among the training rows too." if self.n_test_seen else ""
        return (
            f"On {self.n_test} test rows, used for nothing else, {what} ± standard error over rows: {', '.join(parts)}."
            f"{_beside_fresh(self.tested)}{seen}"
        )

    @property
    def _choice(self) -> str:
        early = " The time limit ended the search early." if self.stopped else ""
        if self.is_at_chance:
            scores, longest = [trial.score for trial in self.trials], max(trial.steps for trial in self.trials)
            return (
                f"None of the {len(scores)} trials learnt anything that {self.n_held_out} held-out rows show: they scored "
                f"{min(scores):.3f} to {max(scores):.3f}, and the commonest label for every row scores {self.majority:.3f} ± "
                f"{self._margin:.3f}. Which candidate is best is not known from this. Give more rows or more steps "
                f"(max_steps, --max-steps; the last round had {longest}). {self.winner} was trained on all "
                f"{self.n_train + self.n_held_out} rows nevertheless.{early}"
            )
        best, tried = self.decisive, {trial.candidate for trial in self.trials if self.is_ranked(trial)}
        beside = "no fresh LoRA r 8 was tried beside it"
        lead = "" if self.lead is None else f"by {self.lead[0]:.3f} ± {self.lead[1]:.3f} of the loss on the same rows"
        if self.winner == "lora_r8" and self.rival in (None, "lora_r8"):  # the same at another rate is not a rival
            beside = "that is a fresh LoRA, and nothing that was recycled was trained as long to compare it with"
        elif self.winner == "lora_r8":
            beside = "that is a fresh LoRA: nothing that was recycled did better here by more than chance"
            beside += "" if self.rival is None else f" ({self.rival} was ahead {lead})" if lead else ""
        elif self.control is not None:
            score, steps = self.control
            every = [trial for trial in self.trials if (trial.candidate, trial.steps) == ("lora_r8", steps)]
            fresh = min(every, key=lambda trial: abs(trial.score - score))
            after = "" if fresh.steps == best.steps else f" after {fresh.steps} steps"
            beside = f"a fresh LoRA r 8 had {self._held_out(fresh)}{after}"
            beside += f", and it was ahead of that {lead}" if lead else ""
        return (
            f"Best of {len(tried)} candidates: {self.winner} at the learning rate {self.learning_rate:g}, with "
            f"{best.n_parameters:,} trained values beside the head. What decided was the loss on {self.n_held_out} held-out rows "
            f"after {best.steps} steps: {self._held_out(best)}; {beside}. It was then trained on all "
            f"{self.n_train + self.n_held_out} rows.{early}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RecycleReport":
        """The report that `to_dict` gave, also after JSON.

        Args:
            data: What `to_dict` returned.

        Raises:
            ArtifactError: If it is not such a report.
        """
        try:
            control = None if data["control"] is None else (float(data["control"][0]), int(data["control"][1]))
            trials = tuple(Trial.from_dict(trial) for trial in data["trials"])
            lead = None if data.get("lead") is None else (float(data["lead"][0]), float(data["lead"][1]))
            names: dict[str, Any] = {name: tuple(data.get(name, ())) for name in ("skipped", "candidates")}
            names["learning_rates"] = {name: tuple(rates) for name, rates in data.get("learning_rates", {}).items()}
            names["tested"] = tuple(FinalScore(**each) for each in data.get("tested", ()))
            return cls(**{**_renamed(data), "control": control, "trials": trials, "lead": lead, **names})
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"This is not a report of recycle ({error}); run it again.") from error


def _compared(each: FinalScore) -> str:
    """How far the result is ahead of one of the others, or behind."""
    if each.lead is None:
        return ""
    lead, error = each.lead
    return f" (the result is {'ahead' if lead >= 0 else 'behind'} by {_with_error(abs(lead), error)})"


def _beside_fresh(tested: Sequence[FinalScore]) -> str:
    """What the test rows say of recycling, in a sentence; nothing where a fresh LoRA was not beside it."""
    lead, error = next((each.lead for each in tested if each.name == "lora_r8" and each.lead), (None, None))
    if lead is None or error is None:
        return ""
    if abs(lead) <= 2 * error:
        return " There recycling did not surely beat a fresh LoRA, nor the other way round: that is within two standard errors."
    return f" There {'recycling' if lead > 0 else 'a fresh LoRA'} was ahead by more than two standard errors, with this one seed."
