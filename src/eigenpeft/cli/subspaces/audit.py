"""The command audit: what can be done with a collection of adapters."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from eigenpeft.artifacts.atomic import check_file
from eigenpeft.audit import AuditReport
from eigenpeft.audit import audit_adapters as run_audit
from eigenpeft.cli.app import (
    Adapters,
    AllowDifferentBaseModels,
    Exclude,
    Json,
    LabelColumn,
    Overwrite,
    TextColumn,
    app,
    console,
    errors,
    print_json,
    quiet,
)
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.audit_figure import plot_audit, write_page
from eigenpeft.report.audit_tables import answers_text, gradient_table, share_table, sharing_table, unshared_table
from eigenpeft.report.markup import escape
from eigenpeft.report.tables import findings_text

Model = Annotated[
    str | None,
    typer.Option(
        help="Base model (folder or Hub id) for the gradient of a new task; for labels a trained classifier, or --train-head."
    ),
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        help="Rows of the new task: .jsonl, .csv, .parquet or a folder saved by datasets, with text, messages, or prompt "
        "and completion; or text and label."
    ),
]
TrainHead = Annotated[
    bool,
    typer.Option(
        "--train-head", help="Give --model a new head for the labels of --dataset, trained lightly on these rows."
    ),
]
Share = Annotated[
    list[str] | None,
    typer.Option(
        help="Also what shared banks would cost: 'layers' for one bank for all layers of a kind, or a pattern of modules "
        "that share one; repeated. About doubles the time."
    ),
]


@app.command()
def audit(
    adapters: Adapters,
    n_components: Annotated[int, typer.Option("--n-components", "-k", help="Largest number of components.")] = 64,
    n_nulls: Annotated[int, typer.Option(help="Draws of random adapters to compare with.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    model: Model = None,
    dataset: Dataset = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    n_rows: Annotated[int, typer.Option(help="Rows of the new task to use.")] = 64,
    train_head: TrainHead = False,
    n_train: Annotated[int, typer.Option(help="Training rows that the new task has, for the second answer.")] = 64,
    exclude: Exclude = None,
    share: Share = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write the figure to.")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML page to write, complete in itself.")] = None,
    allow_different_base_models: AllowDifferentBaseModels = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Say what can be done with adapters: compress them, train a new task from them, reuse one. Seconds to minutes.

    From the weights alone, beside random adapters of the same sizes. With --model and --dataset also for a task of yours: its
    gradient before any training, and the adapters nearest to it.

    Example: eigenpeft audit adapters/ --html audit.html
    """
    quiet(as_json)
    _check_task(model, dataset, train_head=train_head)
    for path in (plot, html):
        if path is not None:
            check_file(path, overwrite=overwrite, inputs=adapters)
    with AdapterCollection.from_pretrained(adapters, allow_different_base_models=allow_different_base_models) as opened:
        collection = opened.without(*exclude) if exclude else opened
        task = None
        if model is not None and dataset is not None:
            # Imported here, since it takes as long as all else: most audits look at the adapters alone.
            tasks = import_module("eigenpeft.cli.tasks")
            settings: dict[str, Any] = {"n_rows": n_rows, "train_head": train_head, "seed": seed}
            columns = tasks.Columns(text_column, label_column)
            task = tasks.load_task(model, dataset, columns=columns, adapters=collection.adapters, **settings)
            errors.print(f"The rows of --dataset are taken for {escape(task.kind)}.", soft_wrap=True)
        report = run_audit(
            collection,
            model=None if task is None else task.model,
            rows=None if task is None else task.rows,
            data_collator=None if task is None else task.data_collator,
            n_rows=n_rows,
            n_train=n_train,
            n_components=n_components,
            n_nulls=n_nulls,
            share="layers" if share == ["layers"] else share or None,
            seed=seed,
            progress=not as_json,
        )
    _write(report, plot, html, overwrite=overwrite)
    if as_json:
        print_json(report.to_dict())
        return
    _show(report, adapters)
    for path in (plot, html):
        if path is not None:
            console.print(f"Wrote {escape(str(path))}.")


def _check_task(model: str | None, dataset: Path | None, *, train_head: bool) -> None:
    """Refuse half a task, before adapters are looked for on the Hub."""
    if (model is None) != (dataset is None):
        raise EigenPeftError("Pass both --model and --dataset: the gradient of a new task needs the two of them.")
    if train_head and model is None:
        raise EigenPeftError("--train-head goes with --model and --dataset; leave it out or pass the two of them.")
    if dataset is not None:  # imported here for the same reason as the task below
        import_module("eigenpeft.cli.rows").check_there(dataset)


def _write(report: AuditReport, plot: Path | None, html: Path | None, *, overwrite: bool) -> None:
    if plot is not None:
        plot_audit(report, plot, overwrite=overwrite)
    if html is not None:
        write_page(report, html, overwrite=overwrite)


def _show(report: AuditReport, adapters: list[str]) -> None:
    console.print(share_table(report))
    console.print(unshared_table(report))
    if report.gradient is not None:
        console.print(gradient_table(report.gradient))
    if report.sharing is not None:
        console.print(sharing_table(report.sharing))
        console.print(f"{escape(report.sharing.text)}\n")
    if report.findings:
        console.print("Noticed about the adapters:")
        console.print(findings_text(report.findings))
    console.print(f"A detail, how much the adapters share: {escape(report.verdict)}. {escape(report.advice)}\n")
    console.print(answers_text(report, adapters=adapters))
