"""The commands index and which: mean embeddings of many tasks, and the adapter for rows of a task."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eigenpeft.artifacts.atomic import check_output
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.cli.rows import open_rows
from eigenpeft.errors import EigenPeftError
from eigenpeft.indexing import AdapterIndex, IndexAnswer, build_index
from eigenpeft.indexing.index_files import INDEX
from eigenpeft.report.markup import escape
from eigenpeft.subspace import AdapterStore

_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


@app.command("index")
def index_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with rows of each adapter's task: NAME.jsonl (or .json, .csv, .parquet) per adapter."
        ),
    ],
    model: Annotated[str, typer.Option(help="Base model, folder or Hub id, whose mean hidden states embed the rows.")],
    out: Out,
    store: Annotated[
        str | None, typer.Option(help="Store whose members the names must be; says which have no rows.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Rows of each task that are embedded and kept.")] = 256,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Embed a few rows of each adapter's task, so that `eigenpeft which` can name the adapter for other rows.

    Example: eigenpeft index rows/ --model base-model --store store --out store-index
    """
    quiet(as_json)
    if not folder.is_dir():
        raise EigenPeftError(f"{str(folder)!r} is not a folder; pass one with NAME.jsonl for each adapter.")
    check_output(out, kind=INDEX.label, overwrite=overwrite, inputs=[folder])
    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    tables: dict[str, Path] = {}
    for file in files:
        if file.stem in tables:
            raise EigenPeftError(
                f"{file.name!r} and {tables[file.stem].name!r} are both rows of {file.stem!r}; keep one."
            )
        tables[file.stem] = file
    if not tables:
        raise EigenPeftError(f"{str(folder)!r} holds no file that ends in {', '.join(_ENDINGS)}.")
    lacking: list[str] = []
    if store is not None:
        members = AdapterStore.from_pretrained(store).names
        unknown = [name for name in tables if name not in members]
        if unknown:
            raise EigenPeftError(
                f"{len(unknown)} files are not named after a member of {store!r}, such as {tables[unknown[0]].name!r}. Its members "
                f"are {', '.join(members[:10])}{', ...' if len(members) > 10 else ''}."
            )
        lacking = [name for name in members if name not in tables]
    opened = {name: _first_rows(file, max_rows) for name, file in tables.items()}
    index = build_index(opened, encoder=model, max_rows=max_rows, progress=not as_json)
    index.save_pretrained(out, overwrite=overwrite)
    if as_json:
        print_json({"names": list(index.names), "without_rows": lacking, "out": str(out)})
        return
    console.print(f"Wrote the index of {len(index)} adapters to {escape(str(out))}.")
    if lacking:
        console.print(f"{len(lacking)} members have no rows and are not in it: {escape(', '.join(lacking[:10]))}.")


@app.command("which")
def which_command(
    dataset: Annotated[
        Path, typer.Argument(help="Rows of the task: .jsonl, .json, .csv, .parquet or a folder saved by datasets.")
    ],
    index: Annotated[str, typer.Option(help="Index: folder or Hub id.")],
    model: Annotated[
        str | None, typer.Option(help="Where the index's base model lies now; default: where it was.")
    ] = None,
    n_rows: Annotated[int, typer.Option("--n-rows", "-n", help="Rows to look at.")] = 8,
    top_k: Annotated[int, typer.Option(help="Names to give.")] = 5,
    as_json: Json = False,
) -> None:
    """Name the adapter for rows of a task, with scores and how sure the first name is.

    Example: eigenpeft which task.jsonl --index store-index
    """
    quiet(as_json)
    if n_rows < 1:
        raise EigenPeftError(f"--n-rows {n_rows} must be at least 1.")
    first = _first_rows(dataset, n_rows)  # before the index is looked for on the Hub
    answer = AdapterIndex.from_pretrained(index, encoder=model).query(first, top_k=top_k)
    if as_json:
        print_json(answer.to_dict())
        return
    console.print(_table(answer))
    console.print(f"[bold]{escape(answer.text)}[/bold]")


def _first_rows(file: Path, number: int) -> list[Any]:
    table = open_rows(file)
    return list(table.select(range(min(number, len(table)))))


def _table(answer: IndexAnswer) -> Table:
    """The names with their cosines."""
    table = Table(title=f"Nearest to {answer.n_rows} rows")
    table.add_column("adapter")
    table.add_column("cosine", justify="right")
    for match in answer.matches:
        table.add_row(escape(match.name), f"{match.score:.3f}")
    return table
