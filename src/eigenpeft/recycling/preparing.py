"""Before the rounds: the multiplier of the merged start, and the adapter that is nearest to the task."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from eigenpeft.audit.task.light_head import LIGHT_RATE
from eigenpeft.audit.task.reuse import nearest_adapters
from eigenpeft.combining import merged_start
from eigenpeft.errors import EigenPeftError
from eigenpeft.recycling.candidates import CANDIDATES, NEAREST, Sources
from eigenpeft.recycling.search import Search
from eigenpeft.recycling.training import judge

SCALES = (0.5, 1.0, 2.0, 3.0)


def prepared(search: Search, plain: Sources, candidates: Sequence[str], *, steps: int) -> Sources:
    """The sources with λ of the best merged start and with the nearest adapter, each looked for only where it is used.

    Args:
        search: What all trials have in common; takes note of a nearest adapter that is refused.
        plain: The sources as they are.
        candidates: Names of the candidates of the run.
        steps: Steps of the short trainings.

    Raises:
        EigenPeftError, OSError, ValueError: As `recycle`.
    """
    scale, nearest = plain.scale, plain.nearest
    if any(CANDIDATES[name].merged for name in candidates):
        scale = max(SCALES, key=lambda value: _start_score(search, with_start(plain, scale=value), steps=steps))
    if NEAREST in candidates:
        try:
            nearest = _nearest(search, plain, steps=steps)
        except EigenPeftError as error:
            search.refused[NEAREST] = str(error)
    return with_start(plain, scale=scale, nearest=nearest)


def with_start(sources: Sources, *, scale: float | None = None, nearest: str | None = None) -> Sources:
    """The same sources with another multiplier or another nearest adapter.

    Args:
        sources: The sources; not changed.
        scale: λ; None keeps it.
        nearest: Name of the nearest adapter; None keeps it.
    """
    place = sources.scale if scale is None else scale
    return replace(sources, scale=place, nearest=nearest or sources.nearest)


def _start_score(search: Search, sources: Sources, *, steps: int) -> float:
    """Minus the loss of the merged start; a new head, if the task has one, is trained on it first."""
    try:
        rate = search.learning_rates["merged_head"][0]
        trial = search.trial("merged_head", sources, learning_rate=rate, steps=steps)
        return -trial.loss
    except EigenPeftError:
        torch.manual_seed(search.args.seed)
        base = search.make_model()
        merged_start(base, adapters=sources.merged)
        _, losses = judge(base, search.held_out, data_collator=search.data_collator)
        return -fmean(losses)


def _nearest(search: Search, sources: Sources, *, steps: int) -> str:
    """The adapter whose update points furthest downhill on the rows, behind a head trained alone where there is a new one."""
    model: Any
    try:
        zero = with_start(sources, scale=0.0)
        model = search.trained("merged_head", zero, learning_rate=LIGHT_RATE, steps=steps, rows=search.rows)
    except EigenPeftError:
        torch.manual_seed(search.args.seed)
        model = search.make_model()
    rows = [search.rows[i] for i in range(min(len(search.rows), 64))]
    batches = [search.data_collator(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    return next(iter(nearest_adapters(sources.collection, model=model, batches=batches).adapters))
