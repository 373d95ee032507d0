"""The command recycle: from adapters, a base model and rows of a new task to the best adapter within a budget."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from transformers import TrainingArguments

from eigenpeft.cli.app import (
    Adapters,
    AllowDifferentBaseModels,
    Json,
    Out,
    Overwrite,
    app,
    console,
    errors,
    print_json,
    quiet,
)
from eigenpeft.cli.rows import load_new_task, without_load_reports
from eigenpeft.collection import AdapterCollection
from eigenpeft.recycling import CANDIDATES, RecycleReport
from eigenpeft.recycling import recycle as run_recycle
from eigenpeft.report.markup import escape


@app.command("recycle")
def recycle_command(
    adapters: Adapters,
    model: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    dataset: Annotated[
        Path,
        typer.Option(
            help="Rows of the new task: .jsonl, .csv, .parquet or a folder saved by datasets, with text and label; or text, "
            "messages, or prompt and completion."
        ),
    ],
    out: Out,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps of the last training.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    n_components: Annotated[int, typer.Option("--n-components", "-k", help="Components per module.")] = 8,
    head_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of a new head beside an adapter.")
    ] = 3e-2,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help=f"Which to try, repeated for several: {', '.join(CANDIDATES)}. Default: all."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Cost of the search in trainings of --max-steps; more reaches more candidates and rates."),
    ] = 3.0,
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
    task = load_new_task(model, dataset)
    opened = AdapterCollection.from_pretrained(adapters, allow_different_base_models=allow_different_base_models)
    with opened as collection, tempfile.TemporaryDirectory() as scratch, without_load_reports():
        report = run_recycle(
            collection,
            make_model=task.make_model,
            rows=task.rows,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=max_steps,
                per_device_train_batch_size=batch_size,
                seed=seed,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            out_dir=out,
            data_collator=task.collator,
            candidates=candidate or tuple(CANDIDATES),
            task_type=task.task_type,
            n_components=n_components,
            head_learning_rate=head_learning_rate,
            budget=budget,
            time_limit=time_limit,
            overwrite=overwrite,
            progress=not as_json,
            say=lambda line: errors.print(escape(line), soft_wrap=True),
        )
    if as_json:
        print_json(report.to_dict())
        return
    if not report.is_at_chance:  # an order would be read as a finding
        console.print(_table(report))
    if report.skipped:
        console.print(f"Not reached within the budget (--budget): {', '.join(report.skipped)}")
    for name, reason in report.refused.items():
        console.print(f"Not tried: {escape(name)}: {escape(reason)}")
    console.print(f"[bold]{escape(report.text)}[/bold]")
    console.print(
        f"Wrote {escape(str(out / 'adapter'))} (its README.md has the lines that load it) and {escape(str(out / 'report.json'))}."
    )


def _table(report: RecycleReport) -> Table:
    """Every candidate at its best rate, with its score after each round."""
    table = Table(title=f"Scores on {report.n_held_out} held-out rows")
    rounds = sorted({trial.steps for trial in report.trials})
    for title in ("candidate", "rate", "trained values", *(f"{steps} steps" for steps in rounds), "seconds"):
        table.add_column(title, justify="left" if title == "candidate" else "right")
    for name, rate, scale in dict.fromkeys(
        (trial.candidate, trial.learning_rate, trial.scale) for trial in report.trials
    ):
        own = [
            trial
            for trial in report.trials
            if (trial.candidate, trial.learning_rate, trial.scale) == (name, rate, scale)
        ]
        by_steps = {trial.steps: f"{trial.score:.3f}" for trial in own}
        shown = name if scale is None else f"{name}, λ = {scale:g}"
        scores = (by_steps.get(steps, "") for steps in rounds)
        table.add_row(shown, f"{rate:g}", f"{own[0].numbers:,}", *scores, f"{sum(trial.seconds for trial in own):.0f}")
    return table
