"""The trials of one run: each candidate trained and judged once, remembered on disk, and halved in rounds."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from eigenpeft.combining import merged_start
from eigenpeft.errors import EigenPeftError
from eigenpeft.recycling.candidates import CANDIDATES, Sources
from eigenpeft.recycling.halving import better_half
from eigenpeft.recycling.report import Trial
from eigenpeft.recycling.training import judge, train


@dataclass
class Search:
    """What all trials of a run have in common, and those that are done."""

    make_model: Callable[[], PreTrainedModel]
    rows: Any
    held_out: Any
    args: TrainingArguments
    collator: Callable[[list[Any]], Any]
    trainer: Callable[..., Trainer]
    head_rate: float
    log: Path
    deadline: float
    say: Callable[[str], None] = lambda _: None
    work: int = 0  # steps that are planned, the last training included
    trials: list[Trial] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    has_estimated: bool = False

    def model(self, candidate: str, sources: Sources) -> PeftModel:
        """A fresh base, merged if the candidate asks for it, with the candidate's adapter."""
        torch.manual_seed(self.args.seed)
        base = self.make_model()
        if CANDIDATES[candidate].merged:
            merged_start(base, sources.merged)
        return CANDIDATES[candidate].adapt(base, sources)

    def trained(self, candidate: str, sources: Sources, *, rate: float, steps: int, rows: Any) -> PeftModel:
        """A candidate trained for a number of steps; where nothing but a head is trained, the rate is the head's."""
        model = self.model(candidate, sources)
        settings = {"args": self.args, "collator": self.collator, "trainer": self.trainer}
        only_head = not any(p.requires_grad and "modules_to_save" not in name for name, p in model.named_parameters())
        train(model, rows, rate=rate, head_rate=rate if only_head else self.head_rate, steps=steps, **settings)
        return model

    def done(self, candidate: str, sources: Sources, *, rate: float, steps: int) -> Trial | None:
        """What an earlier run, or this one, found for it."""
        asked = _asked(candidate, sources, rate=rate, steps=steps)
        same = (one for one in self.trials if asked == {name: getattr(one, name) for name in asked})
        return next(same, None)

    def trial(self, candidate: str, sources: Sources, *, rate: float, steps: int) -> Trial:
        """Train and judge, or what was found when this was done before."""
        if (done := self.done(candidate, sources, rate=rate, steps=steps)) is not None:
            return done
        start = time.perf_counter()
        model = self.trained(candidate, sources, rate=rate, steps=steps, rows=self.rows)
        numbers = sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name
        )
        score, loss = judge(model, self.held_out, collator=self.collator)
        asked = _asked(candidate, sources, rate=rate, steps=steps)
        found = Trial(**asked, score=score, loss=loss, numbers=numbers, seconds=time.perf_counter() - start)
        self.trials.append(found)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        self._estimate(found)
        return found

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


def _asked(candidate: str, sources: Sources, *, rate: float, steps: int) -> dict[str, Any]:
    """What makes a trial the same as another."""
    return {"candidate": candidate, "rate": rate, "steps": steps, "scale": _scale_of(candidate, sources)}


def _scale_of(candidate: str, sources: Sources) -> float | None:
    return sources.scale if CANDIDATES[candidate].merged else None


def halved(
    search: Search, sources: Sources, entrants: list[tuple[str, float]], *, steps: int, bar: tqdm
) -> tuple[list[tuple[str, float]], Trial, bool]:
    """Rounds until one entrant is left or time is up; what is left, the best trial of the last round, whether time was up."""
    while True:
        found: list[tuple[tuple[str, float], tuple[float, ...]]] = []
        by_entrant: dict[tuple[str, float], Trial] = {}
        for name, rate in entrants:
            # What was tried before the time was up counts, also in an earlier run that was interrupted.
            costs = search.done(name, sources, rate=rate, steps=steps) is None
            if name in search.refused or (search.late and costs and by_entrant):
                continue
            try:
                trial = search.trial(name, sources, rate=rate, steps=steps)
            except EigenPeftError as error:
                search.refused[name] = str(error)
                continue
            by_entrant[name, rate] = trial
            found.append(((name, rate), (trial.score, -trial.loss)))
            bar.update()
            bar.set_postfix_str(f"{steps} steps, {name}: {trial.score:.3f}")
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in search.refused.items())
            raise EigenPeftError(f"No candidate could be tried. {reasons}")
        kept = better_half(found)
        after = min(2 * steps, search.args.max_steps)
        tried = all(search.done(name, sources, rate=rate, steps=after) for name, rate in kept)
        if len(kept) == 1 or (search.late and not tried) or steps >= search.args.max_steps:
            return kept, by_entrant[kept[0]], search.late
        entrants, steps = kept, after
