"""The trials of one run: each candidate trained and judged once, remembered on disk, and halved in rounds beside the control."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from eigenpeft.combining import merged_start
from eigenpeft.errors import EigenPeftError
from eigenpeft.recycling.candidates import CANDIDATES, CONTROL, NEAREST, Sources
from eigenpeft.recycling.halving import better_half, paired_lead
from eigenpeft.recycling.report import Trial
from eigenpeft.recycling.training import judge, train


@dataclass
class Search:
    """What all trials of a run have in common, those that are done, and which of these this run looked at.

    Attributes:
        make_model: Makes the base model with the new task's head.
        rows: Rows that candidates are trained on.
        held_out: Rows that they are judged on.
        args: Arguments of the Trainer.
        data_collator: Makes a batch of rows.
        trainer: `Trainer`, a subclass, or a function that makes one.
        learning_rates: Every candidate to the peak learning rates of its adapter, in order.
        head_learning_rate: Peak learning rate of a new head beside an adapter.
        log: File that every trial is written to, a line each.
        deadline: When time is up, on the clock of `time.monotonic`.
        say: Called with lines for the user.
        work: Steps that are planned, the last training and those for the test rows included.
        trials: All trials that are done, earlier runs' too.
        used: Those that this run looked at.
        refused: Why a candidate cannot be trained here, by candidate.
        has_estimated: Whether the user has been told how long all may take.
    """

    make_model: Callable[[], PreTrainedModel]
    rows: Any
    held_out: Any
    args: TrainingArguments
    data_collator: Callable[[list[Any]], Any]
    trainer: Callable[..., Trainer]
    learning_rates: Mapping[str, Sequence[float]]
    head_learning_rate: float
    log: Path
    deadline: float
    say: Callable[[str], None] = lambda _: None
    work: int = 0
    trials: list[Trial] = field(default_factory=list)
    used: list[Trial] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    has_estimated: bool = False

    def model(self, candidate: str, sources: Sources) -> PeftModel:
        """A fresh base, merged if the candidate asks for it, with the candidate's adapter.

        Args:
            candidate: Key of `CANDIDATES`.
            sources: The adapters, and what candidates make of them.

        Raises:
            EigenPeftError: If the candidate cannot be made from these adapters.
            OSError, ValueError: If a file of an adapter is gone or was damaged since the collection was opened.
        """
        torch.manual_seed(self.args.seed)
        base = self.make_model()
        if CANDIDATES[candidate].merged:
            merged_start(base, adapters=sources.merged)
        return CANDIDATES[candidate].adapt(base, sources)

    def trained(self, candidate: str, sources: Sources, *, learning_rate: float, steps: int, rows: Any) -> PeftModel:
        """A candidate trained for a number of steps; where nothing but a head is trained, the rate is the head's.

        Args:
            candidate: Key of `CANDIDATES`.
            sources: The adapters, and what candidates make of them.
            learning_rate: Peak learning rate.
            steps: Number of steps.
            rows: Rows to train on.

        Raises:
            EigenPeftError: As `model`.
            OSError, ValueError: As `model`.
        """
        model = self.model(candidate, sources)
        settings = {"args": self.args, "data_collator": self.data_collator, "trainer": self.trainer}
        only_head = not any(p.requires_grad and "modules_to_save" not in name for name, p in model.named_parameters())
        train(
            model,
            rows,
            learning_rate=learning_rate,
            head_learning_rate=learning_rate if only_head else self.head_learning_rate,
            steps=steps,
            **settings,
        )
        return model

    def done(self, candidate: str, sources: Sources, *, learning_rate: float, steps: int) -> Trial | None:
        """The trial of an earlier run, or of this one, with these settings; None where it was not tried.

        Args:
            candidate: Key of `CANDIDATES`.
            sources: The adapters, and what candidates make of them.
            learning_rate: Peak learning rate.
            steps: Number of steps.
        """
        asked = _asked(candidate, sources, learning_rate=learning_rate, steps=steps)
        same = (one for one in self.trials if asked == {name: getattr(one, name) for name in asked})
        return next(same, None)

    def trial(self, candidate: str, sources: Sources, *, learning_rate: float, steps: int) -> Trial:
        """Train and judge a candidate, or return the trial of a run that did so before.

        Args:
            candidate: Key of `CANDIDATES`.
            sources: The adapters, and what candidates make of them.
            learning_rate: Peak learning rate.
            steps: Number of steps.

        Raises:
            EigenPeftError: As `model`.
            OSError, ValueError: As `model`.
        """
        if (done := self.done(candidate, sources, learning_rate=learning_rate, steps=steps)) is not None:
            self._use(done)
            return done
        start = time.perf_counter()
        model = self.trained(candidate, sources, learning_rate=learning_rate, steps=steps, rows=self.rows)
        n_parameters = sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name
        )
        score, losses = judge(model, self.held_out, data_collator=self.data_collator)
        asked = _asked(candidate, sources, learning_rate=learning_rate, steps=steps)
        measured = {"score": score, "loss": fmean(losses), "losses": tuple(losses), "n_parameters": n_parameters}
        found = Trial(**asked, **measured, seconds=time.perf_counter() - start)
        self.trials.append(found)
        self._use(found)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        self._estimate(found)
        return found

    def _use(self, trial: Trial) -> None:
        if trial not in self.used:
            self.used.append(trial)

    def _estimate(self, first: Trial) -> None:
        """After the first trial that was trained in this run: how long all may take."""
        if self.has_estimated:
            return
        self.has_estimated = True
        minutes = first.seconds / first.steps * self.work / 60
        shown = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
        self.say(
            f"The first trial took {first.seconds:.1f} s for {first.steps} steps: all of it takes about {shown} at that pace, less "
            "where an earlier run left trials. A time limit (--time-limit) ends the search early."
        )

    @property
    def late(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() > self.deadline


def _asked(candidate: str, sources: Sources, *, learning_rate: float, steps: int) -> dict[str, Any]:
    """What makes a trial the same as another."""
    return {
        "candidate": candidate,
        "learning_rate": learning_rate,
        "steps": steps,
        "scale": _scale_of(candidate, sources),
        "nearest": sources.nearest if candidate == NEAREST else None,
    }


def _scale_of(candidate: str, sources: Sources) -> float | None:
    return sources.scale if CANDIDATES[candidate].merged else None


Entrant = tuple[str, float]


class Decision(NamedTuple):
    """How the rounds ended.

    Attributes:
        winner: The trial of the candidate that is trained on all rows.
        rival: The best trial beside the control's, as long as that; None without such a pair.
        lead: By how much the rival's loss was below the control's, and its standard error; None without a pair.
        stopped: Whether time was up.
    """

    winner: Trial
    rival: Trial | None
    lead: tuple[float, float] | None
    stopped: bool


def halved(search: Search, sources: Sources, entrants: list[Entrant], *, steps: int, bar: tqdm) -> Decision:
    """Rounds until one rival is left beside the control, or time is up; then the better of the two.

    The control is the first entrant of that name; it is trained in every round. A rival wins if its loss on the held-out rows is
    below the control's by more than the standard error of the paired differences, and its score is not lower.

    Args:
        search: What all trials have in common.
        sources: The adapters, and what candidates make of them.
        entrants: Candidates with their learning rates.
        steps: Steps of the first round; each further round has twice as many.
        bar: Progress bar.

    Raises:
        EigenPeftError: If no candidate could be tried.
        OSError, ValueError: As `Search.model`.
    """
    control = next((entrant for entrant in entrants if entrant[0] == CONTROL), None)
    while True:
        found = _round(search, sources, entrants, steps=steps, bar=bar)
        rivals = [(entrant, trial.loss) for entrant, trial in found.items() if entrant != control]
        beside = [control] if control in found else []
        kept = better_half(rivals) if rivals else []
        after = min(2 * steps, search.args.max_steps)
        ended = len(rivals) <= 1 or (len(kept) == 1 and not beside)
        next_round = [*beside, *kept]
        tried = all(
            search.done(name, sources, learning_rate=learning_rate, steps=after) for name, learning_rate in next_round
        )
        if ended or (search.late and not tried) or steps >= search.args.max_steps:
            return _decided([found[each] for each in kept], [found[each] for each in beside], stopped=search.late)
        entrants, steps = next_round, after


def _round(search: Search, sources: Sources, entrants: list[Entrant], *, steps: int, bar: tqdm) -> dict[Entrant, Trial]:
    """The trials of one round, without what was refused or came too late."""
    found: dict[Entrant, Trial] = {}
    for name, learning_rate in entrants:
        # What was tried before the time was up counts, also in an earlier run that was interrupted.
        costs = search.done(name, sources, learning_rate=learning_rate, steps=steps) is None
        if name in search.refused or (search.late and costs and found):
            continue
        bar.set_postfix_str(f"{steps} steps, {name}: training")
        try:
            trial = found[name, learning_rate] = search.trial(name, sources, learning_rate=learning_rate, steps=steps)
        except EigenPeftError as error:
            search.refused[name] = str(error)
            continue
        bar.update()
        bar.set_postfix_str(f"{steps} steps, {name}: {trial.score:.3f}")
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in search.refused.items())
        raise EigenPeftError(f"No candidate could be tried. {reasons}")
    return found


def _decided(rivals: list[Trial], control: list[Trial], *, stopped: bool) -> Decision:
    if not (rivals and control):
        return Decision((rivals + control)[0], None, None, stopped)
    rival, beside = rivals[0], control[0]
    mean, error = paired_lead(rival.losses, beside.losses)
    is_ahead = mean > error and rival.score >= beside.score
    return Decision(rival if is_ahead else beside, rival, (mean, error), stopped)
