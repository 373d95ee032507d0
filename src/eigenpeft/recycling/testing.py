"""The result on rows that were used for nothing else, beside a fresh LoRA and the head alone or the untouched base model."""

import math
from statistics import fmean
from typing import Any

import torch

from eigenpeft.errors import EigenPeftError
from eigenpeft.linalg.scores.intervals import mean_error
from eigenpeft.recycling.candidates import CONTROL, Sources
from eigenpeft.recycling.earlier import row_text
from eigenpeft.recycling.halving import paired_lead
from eigenpeft.recycling.preparing import with_start
from eigenpeft.recycling.report import FinalScore, Trial
from eigenpeft.recycling.search import Search
from eigenpeft.recycling.training import judge_rows

N_COMPARED = 2  # trainings at most beside the result's: a fresh LoRA, and the head alone


def tested(search: Search, sources: Sources, best: Trial, *, model: Any, rows: Any, test_rows: Any) -> dict[str, Any]:
    """What the report has of the test rows: scores with standard errors over rows, and the result's lead on the same rows.

    A fresh LoRA r 8 is trained on all rows for as many steps as the result, at the rate that was best for it; so is the head
    alone, where the task has a new one.

    Args:
        search: Search of the run.
        sources: The adapters.
        best: The winner's trial.
        model: The result.
        rows: All rows that it was trained on.
        test_rows: Others; None for none.

    Raises:
        EigenPeftError, OSError, ValueError: As `recycle`.
    """
    if test_rows is None:
        return {}
    scores, losses = judge_rows(model, test_rows, data_collator=search.data_collator)
    found = [FinalScore(best.candidate, best.learning_rate, fmean(scores), _error(scores), fmean(losses))]
    for name, learning_rate, other in _beside(search, sources, best, rows):
        theirs, their_losses = judge_rows(other, test_rows, data_collator=search.data_collator)
        lead, error = paired_lead(theirs, scores)
        both = (lead, error if math.isfinite(error) else None)
        found.append(FinalScore(name, learning_rate, fmean(theirs), _error(theirs), fmean(their_losses), both))
    seen = {row_text(rows[i]) for i in range(len(rows))}
    n_seen = sum(row_text(test_rows[i]) in seen for i in range(len(test_rows)))
    return {"tested": tuple(found), "n_test": len(test_rows), "n_test_seen": n_seen}


def _beside(search: Search, sources: Sources, best: Trial, rows: Any) -> list[tuple[str, float | None, Any]]:
    """Name, learning rate and model of what the result is compared with."""
    steps, rate = search.args.max_steps, _control_rate(search)
    found: list[tuple[str, float | None, Any]] = []
    if (best.candidate, best.learning_rate) != (CONTROL, rate):
        found.append((CONTROL, rate, search.trained(CONTROL, sources, learning_rate=rate, steps=steps, rows=rows)))
    head, rate = "merged_head", search.learning_rates["merged_head"][0]
    try:  # λ = 0 adds no update, so that the head is trained on the base model alone
        zero = with_start(sources, scale=0.0)
        found.append(("head alone", rate, search.trained(head, zero, learning_rate=rate, steps=steps, rows=rows)))
    except EigenPeftError:
        torch.manual_seed(search.args.seed)
        found.append(("base model", None, search.make_model()))
    return found


def _control_rate(search: Search) -> float:
    """The rate at which a fresh LoRA did best where it was trained longest; its first where there are no trials."""
    own = [trial for trial in search.used if trial.candidate == CONTROL]
    if not own:
        return search.learning_rates[CONTROL][0]
    longest = max(trial.steps for trial in own)
    return min((trial for trial in own if trial.steps == longest), key=lambda trial: trial.loss).learning_rate


def _error(values: list[float]) -> float | None:
    """Standard error of a mean; None below two rows, or where a value is not finite."""
    error = mean_error(values)
    return error if math.isfinite(error) else None
