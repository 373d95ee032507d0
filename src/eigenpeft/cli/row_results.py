"""Results with a row per row of the input: joined to its columns, written as JSON lines, and the first of them shown."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.cli.app import console, finite
from eigenpeft.report.markup import escape

SHOWN = 20  # rows on a terminal; all are in --out and --json
_WIDTH = 60  # characters of a text in a table


def shortened(text: str) -> str:
    """A text as a table shows it.

    Args:
        text: Text of a row.
    """
    return escape(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}...")


def with_input(table: Any, results: Sequence[dict[str, Any]], *, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Results as a user joins them to the rows that they are of: number of the row, its own columns, then the results.

    A column of the input that has the name of a result is left out; `replaced_columns` names them.

    Args:
        table: Rows of the input, a `datasets.Dataset`.
        results: JSON-able, one per row, in the same order.
        without: Columns that are not kept, such as features.
    """
    replaced = replaced_columns(table, results)
    kept = [name for name in table.column_names if name not in (*without, *replaced)]
    own = table.select_columns(kept) if kept else [{}] * len(results)
    return [
        {"row": i, **json.loads(json.dumps(row, default=str)), **result}
        for i, (row, result) in enumerate(zip(own, results, strict=True))
    ]


def replaced_columns(table: Any, results: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of the input that have the name of a result, or of the row's number.

    Args:
        table: Rows of the input.
        results: One per row.
    """
    taken = {"row", *(results[0] if results else ())}
    return [name for name in table.column_names if name in taken]


def write_rows(rows: Sequence[dict[str, Any]], out: Path | None, *, overwrite: bool) -> None:
    """Write results as JSON lines, whole or not at all; nothing without a file.

    Args:
        rows: A JSON-able table per row.
        out: The file; None for none.
        overwrite: Whether a file of that name may be replaced.

    Raises:
        ArtifactError: If the file is there, or cannot be written.
    """
    if out is not None:
        with atomic_file(out, overwrite=overwrite) as scratch:
            scratch.write_text("".join(json.dumps(finite(row)) + "\n" for row in rows), encoding="utf-8")


def show_rows(table: Table, rows: Sequence[Any], out: Path | None) -> None:
    """Print the table of the first rows, and where all are.

    Args:
        table: Table of the first `SHOWN` rows.
        rows: All of them.
        out: The file that has them; None for none.
    """
    console.print(table)
    if len(rows) > SHOWN and out is None:
        console.print(f"{len(rows) - SHOWN} more rows; --out or --json has all.")
    if out is not None:
        console.print(f"Wrote {escape(str(out))}: {len(rows)} rows.")
