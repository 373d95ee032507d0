"""The command recycle: from adapters, a base model and rows of a new task to the best adapter within a budget."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from transformers import TrainingArguments

from eigenpeft.cli.app import (
    Adapters,
    AllowDifferentBaseModels,
    Json,
    LabelColumn,
    Out,
    Overwrite,
    TextColumn,
    app,
    console,
    errors,
    print_json,
    quiet,
)
from eigenpeft.cli.rows import check_there, without_load_reports
from eigenpeft.cli.tasks import Columns, load_new_task
from eigenpeft.cli.training.recycle_table import result_text, scales_text, trials_table
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import EigenPeftError
from eigenpeft.recycling import CANDIDATES, RecycleReport
from eigenpeft.recycling import recycle as run_recycle
from eigenpeft.report.markup import escape

Dataset = Annotated[
    Path,
    typer.Option(
        help="Rows of the new task: .jsonl, .csv, .parquet or a folder saved by datasets, with text and label; or text, "
        "messages, or prompt and completion."
    ),
]
Test = Annotated[
    Path | None,
    typer.Option(
        help="Rows like those of --dataset, used for nothing but a score at the end: of the result, a fresh LoRA and the "
        "head alone."
    ),
]
HeadLearningRate = Annotated[float, typer.Option(help="Peak learning rate of a new head beside an adapter.")]
Candidate = Annotated[
    list[str] | None,
    typer.Option(help=f"Which to try, repeated for several: {', '.join(CANDIDATES)}. Default: all."),
]
LearningRate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CANDIDATE=RATE",
        help="A learning rate to try for a candidate in place of its own, repeated for several; larger models want lower ones.",
    ),
]
Budget = Annotated[
    float,
    typer.Option(help="Cost of the search in trainings of --max-steps; more reaches more candidates and rates."),
]


@app.command("recycle")
def recycle_command(
    adapters: Adapters,
    model: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    dataset: Dataset,
    out: Out,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    test: Test = None,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps of the last training.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    n_components: Annotated[int, typer.Option("--n-components", "-k", help="Components per module.")] = 8,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 3e-2,
    candidate: Candidate = None,
    budget: Budget = 3.0,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no new trial starts.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    allow_different_base_models: AllowDifferentBaseModels = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Try what adapters can give to a new task beside fresh LoRAs, and train the best on all rows.

    Candidates are judged on a held-out quarter of the rows in rounds, beside a fresh LoRA, at a cost of about three trainings. One
    wins only if it is ahead of the fresh LoRA by more than chance. The result is a plain LoRA in OUT/adapter. Started again with
    the same arguments, it goes on where it stopped.

    Example: eigenpeft recycle adapters/ --model base-model --dataset task.jsonl --out recycled
    """
    quiet(as_json)
    learning_rates = _learning_rates(learning_rate or [])
    for path in (dataset, *([test] if test else [])):
        check_there(path)  # before adapters are looked for on the Hub
    opened = AdapterCollection.from_pretrained(adapters, allow_different_base_models=allow_different_base_models)
    with opened as collection, tempfile.TemporaryDirectory() as scratch, without_load_reports():
        task = load_new_task(model, dataset, columns=Columns(text_column, label_column), adapters=collection.adapters)
        _say(
            f"{_many(len(collection))}: {_some(collection.names)}. The {len(task.rows)} rows are taken for {task.kind}."
        )
        report = run_recycle(
            collection,
            make_model=task.make_model,
            rows=task.rows,
            args=_arguments(scratch, max_steps=max_steps, batch_size=batch_size, seed=seed),
            out_dir=out,
            data_collator=task.data_collator,
            candidates=candidate or None,
            task_type=task.task_type,
            n_components=n_components,
            learning_rates=learning_rates,
            head_learning_rate=head_learning_rate,
            budget=budget,
            time_limit=time_limit,
            overwrite=overwrite,
            test_rows=None if test is None else task.read(test),
            progress=not as_json,
            say=_say,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, out)


def _show(report: RecycleReport, out: Path) -> None:
    if not report.is_at_chance:  # an order would be read as a finding
        console.print(trials_table(report))
    if (scales := scales_text(report)) is not None:
        console.print(escape(scales), soft_wrap=True)
    if report.skipped:
        console.print(f"Not reached within the budget (--budget): {', '.join(report.skipped)}", soft_wrap=True)
    for name, reason in report.refused.items():
        console.print(f"Not tried: {escape(name)}: {escape(reason)}", soft_wrap=True)
    console.print(f"[bold]{escape(report.text)}[/bold]", soft_wrap=True)
    console.print(escape(result_text(report, out)), soft_wrap=True)


def _arguments(scratch: str, *, max_steps: int, batch_size: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        disable_tqdm=True,
        logging_strategy="no",
    )


def _learning_rates(given: Sequence[str]) -> dict[str, list[float]]:
    """Candidate to rates, from "CANDIDATE=RATE" each."""
    found: dict[str, list[float]] = {}
    for each in given:
        name, _, rate = each.partition("=")
        try:
            found.setdefault(name, []).append(float(rate))
        except ValueError as error:
            raise EigenPeftError(
                f"--learning-rate {each!r} must be a candidate and a rate, like lora_r8=2e-4; candidates are "
                f"{', '.join(CANDIDATES)}."
            ) from error
    return found


def _say(line: str) -> None:
    errors.print(escape(line), soft_wrap=True)


def _many(number: int) -> str:
    return "1 adapter" if number == 1 else f"{number} adapters"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
