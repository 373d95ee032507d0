"""The search from end to end: choose the merged start's multiplier, halve the candidates, train the winner on all rows."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import EigenPeftError
from eigenpeft.recycling.candidates import (
    CANDIDATES,
    CONTROL,
    WITH_HEAD,
    Sources,
    default_candidates,
    learning_rates_of,
)
from eigenpeft.recycling.earlier import ADAPTER, REPORT, TRIALS, check_result, remembered, settings_of
from eigenpeft.recycling.loading import readme
from eigenpeft.recycling.planning import announce, entrants_within
from eigenpeft.recycling.preparing import prepared
from eigenpeft.recycling.report import RecycleReport
from eigenpeft.recycling.result import size_of_result, write_result
from eigenpeft.recycling.search import Decision, Search, halved
from eigenpeft.recycling.testing import N_COMPARED, tested


def recycle(
    collection: AdapterCollection,
    *,
    make_model: Callable[[], PreTrainedModel],
    rows: Any,
    args: TrainingArguments,
    out_dir: str | Path,
    data_collator: Callable[[list[Any]], Any] | None = None,
    trainer: Callable[..., Trainer] = Trainer,
    candidates: Sequence[str] | None = None,
    task_type: str | None = "SEQ_CLS",
    n_components: int = 8,
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    head_learning_rate: float = 3e-2,
    held_out: float = 0.25,
    budget: float = 3.0,
    time_limit: float | None = None,
    overwrite: bool = False,
    test_rows: Any = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> RecycleReport:
    """From adapters, a base model and rows of a new task to the best adapter within a budget.

    Candidates are fresh LoRAs, EigenLoRA in the adapters' subspace, a random subspace, a merged start (the base plus λ times
    the adapters' mean update; then the head alone, LoRA or EigenLoRA), LoRA started at the principal components, and the
    nearest adapter continued. They are judged by their loss on held-out rows in rounds (the better half gets twice the steps),
    with a fresh LoRA r 8 as the control in every round; one of them wins only if it is ahead of the control by more than the
    standard error on the same rows. The winner is trained on all rows. "A fresh LoRA was best" is a result.

    Args:
        collection: Adapters of the base model; at least two.
        make_model: Makes the base model with the new task's head, in the same way each time: the seed is set before.
        rows: Rows of the new task, as the trainer takes them: tokenized, with labels; a sequence or a `datasets.Dataset`.
        args: Steps of the last training (`max_steps`), batch size, precision, seed. Rates and saving are set here.
        out_dir: Folder of the result: `adapter` (a plain LoRA), `report.json`, `trials.jsonl`. Called again with the same
            arguments, it goes on where it stopped. A finished result is not replaced by one of other `candidates` or another
            `budget`, unless `overwrite`.
        data_collator: Makes a batch; default: `transformers.default_data_collator`.
        trainer: `Trainer`, a subclass, or a function that makes one.
        candidates: Keys of `CANDIDATES`, those first that should be tried where the budget does not reach all. Second learning
            rates come after all first ones. None for all, in the order of what did best on tasks of this `task_type`.
        task_type: PEFT's: "SEQ_CLS", "CAUSAL_LM" or another.
        n_components: K of the subspace.
        learning_rates: Candidate to the peak learning rates tried for it, in order. A candidate that is not named has its own,
            which were best on all-MiniLM-L6-v2 and, for "CAUSAL_LM", on SmolLM2-135M. Larger models want lower ones.
        head_learning_rate: Peak learning rate of a new head beside an adapter.
        held_out: Share of the rows that candidates are judged on.
        budget: Cost of everything before the last training, in trainings of `args.max_steps` steps. As many candidates are tried as
            get a fifth of these steps in the first round.
        time_limit: Seconds after which no new trial starts; the best so far is then trained on all rows.
        overwrite: Replace a finished result that was chosen otherwise; its trials count where they have the same settings, and
            are thrown away where the rows, the adapters or other settings differ.
        test_rows: Rows that are used for nothing but scores at the end: of the result, a fresh LoRA r 8, and the head alone (the
            untouched base model, where there is no new head), the last two trained as long on all of `rows`.
        progress: Show a progress bar.
        say: Called with a line before the first trial, how many there are, and one after it, how long all may take.

    Returns:
        `RecycleReport`; its `text` says it in words.

    Raises:
        EigenPeftError: If an argument is out of range, there are too few rows, every candidate is refused, or the folder holds
            trials or a result of other arguments.
        OSError, ValueError: If a file of an adapter is gone or was damaged since the collection was opened.

    Examples:
        Not run with the tests, because a dozen models are trained:

        >>> from eigenpeft import AdapterCollection
        >>> from eigenpeft.recycling import recycle
        >>> from transformers import AutoModelForSequenceClassification, TrainingArguments
        >>> report = recycle(  # doctest: +SKIP
        ...     AdapterCollection.from_pretrained("adapters"),
        ...     make_model=lambda: AutoModelForSequenceClassification.from_pretrained("BASE", num_labels=4),
        ...     rows=rows,  # tokenized, with labels
        ...     args=TrainingArguments("scratch", max_steps=300, per_device_train_batch_size=16),
        ...     out_dir="recycled",
        ... )
        >>> print(report.text)  # doctest: +SKIP
    """
    start, out = time.perf_counter(), Path(out_dir)
    candidates = default_candidates(task_type) if candidates is None else candidates
    _check_arguments(candidates, max_steps=args.max_steps, held_out=held_out, budget=budget)
    train_rows, judged_rows = _split(rows, held_out, seed=args.seed)
    own = {"held_out": held_out, "n_components": n_components, "head_learning_rate": head_learning_rate}
    inputs = [Path(adapter.weights_path).parent for adapter in collection.adapters]
    chosen_from = learning_rates_of(candidates, task_type=task_type, given=learning_rates)
    check_result(out, learning_rates=chosen_from, budget=budget, inputs=inputs, overwrite=overwrite)
    settings = settings_of(collection, rows, args, base_model=_name_of(make_model()), **own)
    trials = remembered(out, settings, overwrite=overwrite)
    search = Search(
        make_model,
        train_rows,
        judged_rows,
        args,
        data_collator or default_data_collator,
        trainer,
        learning_rates_of(tuple(CANDIDATES), task_type=task_type) | chosen_from,
        head_learning_rate,
        out / TRIALS,
        time.monotonic() + (math.inf if time_limit is None else time_limit),
        say,
        work=0 if test_rows is None else N_COMPARED * args.max_steps,
        trials=trials,
    )
    plain = Sources(collection, n_components, 1.0, task_type, args.seed, collection.names[0])
    decision, sources, tried = _chosen(search, plain, chosen_from, budget=budget, progress=progress)
    best = decision.winner
    model = search.trained(best.candidate, sources, learning_rate=best.learning_rate, steps=args.max_steps, rows=rows)
    report = RecycleReport(
        **_outcome(decision, search, learning_rates=chosen_from, tried=tried),
        seconds=time.perf_counter() - start,
        budget=budget,
        **tested(search, sources, best, model=model, rows=rows, test_rows=test_rows),
    )
    return _written(model, report, out, task_type=task_type, base_model=collection.base_model)


def _chosen(
    search: Search, plain: Sources, learning_rates: Mapping[str, Sequence[float]], *, budget: float, progress: bool
) -> tuple[Decision, Sources, list[str]]:
    """How the rounds ended, the sources with what was prepared for them, and the candidates that the budget reached."""
    max_steps = search.args.max_steps
    has_head = plain.task_type in WITH_HEAD
    entrants, steps = entrants_within(learning_rates, max_steps=max_steps, budget=budget, has_head=has_head)
    tried = list(dict.fromkeys(name for name, _ in entrants))
    search.work += announce(entrants, steps=steps, max_steps=max_steps, has_head=has_head, say=search.say)
    sources = prepared(search, plain, tried, steps=steps)
    with tqdm(desc="Recycling", unit="trial", disable=not progress) as bar:
        return halved(search, sources, entrants, steps=steps, bar=bar), sources, tried


def _outcome(
    decision: Decision, search: Search, *, learning_rates: Mapping[str, Sequence[float]], tried: Sequence[str]
) -> dict[str, Any]:
    """What the report has of the search."""
    fresh = [(trial.score, trial.steps) for trial in search.used if trial.candidate == CONTROL]
    return {
        "winner": decision.winner.candidate,
        "learning_rate": decision.winner.learning_rate,
        "score": decision.winner.score,
        "control": max(fresh, key=lambda pair: pair[1]) if fresh else None,
        "rival": None if decision.rival is None else decision.rival.candidate,
        "lead": decision.lead,
        "stopped": decision.stopped,
        "trials": tuple(search.used),
        "refused": search.refused,
        "steps": search.args.max_steps,
        "n_train": len(search.rows),
        "n_held_out": len(search.held_out),
        "majority": _majority(search.held_out),
        "skipped": tuple(name for name in learning_rates if name not in tried),
        "candidates": tuple(learning_rates),
        "learning_rates": learning_rates,
    }


def _written(
    model: PeftModel, report: RecycleReport, out: Path, *, task_type: str | None, base_model: str | None
) -> RecycleReport:
    """The adapter with its README.md, and the report, which then has the adapter's size."""
    config = model.get_base_model().config
    card = readme(
        base=getattr(config, "name_or_path", "") or base_model or "the-base-model",
        adapter=str(out / ADAPTER),
        config=config,
        task_type=task_type,
        text=report.text,
    )
    write_result(model, out / ADAPTER, base_model=base_model, card=card)
    rank, n_bytes = size_of_result(out / ADAPTER)
    report = replace(report, rank=rank, n_bytes=n_bytes)
    with atomic_file(out / REPORT, overwrite=True) as path:
        path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def _name_of(model: PreTrainedModel) -> str:
    """The base model's id, or its folder as a path from the root, so that it is the same from everywhere."""
    name = getattr(model.config, "name_or_path", "")
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _majority(rows: Any) -> float | None:
    """Share of the commonest label; None where labels are not single whole numbers."""
    labels = [rows[i].get("labels", rows[i].get("label")) for i in range(len(rows))]
    values = [label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label for label in labels]
    if not all(isinstance(value, int) for value in values):
        return None
    return Counter(values).most_common(1)[0][1] / len(values)


def _check_arguments(candidates: Sequence[str], *, max_steps: int, held_out: float, budget: float) -> None:
    if not candidates or any(name not in CANDIDATES for name in candidates):
        raise EigenPeftError(f"candidates={list(candidates)} must be of {', '.join(CANDIDATES)}, at least one.")
    if max_steps < 1 or not 0 < held_out < 1:
        raise EigenPeftError(
            f"max_steps={max_steps} of args must be at least 1 (epochs are not counted here) and held_out={held_out} between "
            "0 and 1."
        )
    if not 0 < budget < math.inf:
        raise EigenPeftError(f"budget={budget} must be a positive number of trainings of max_steps={max_steps} steps.")


def _split(rows: Any, share: float, *, seed: int) -> tuple[Any, Any]:
    """Training and held-out rows, drawn by seed."""
    n = len(rows)
    held = max(1, round(n * share))
    if n - held < 1:
        raise EigenPeftError(f"{n} rows cannot be split into training and held-out rows; give at least 2.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    if hasattr(rows, "select"):
        return rows.select(order[held:]), rows.select(order[:held])
    return Subset(rows, order[held:]), Subset(rows, order[:held])
