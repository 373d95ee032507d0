"""The command predict: rows of a file by members of a store, each with its own core and head, mixed in one batch."""

from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from eigenpeft.artifacts.atomic import check_file
from eigenpeft.cli.app import Json, Overwrite, app, print_json, quiet
from eigenpeft.cli.row_results import SHOWN, shortened, show_rows, write_rows
from eigenpeft.cli.rows import open_rows, open_tokenizer, without_load_reports
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape
from eigenpeft.subspace import AdapterStore
from eigenpeft.subspace.stores.changing import BASE
from eigenpeft.tuners.serving.bank import AdapterBank
from eigenpeft.tuners.serving.heads import heads_of
from eigenpeft.tuners.serving.texts import classify_texts


@app.command()
def predict(
    store: Annotated[str, typer.Argument(help="Folder or Hub id of a store of classifiers or reward models.")],
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with text (and text_pair): .jsonl, .json, .csv, .parquet or a folder saved by datasets. The column member "
            f"names each row's member, {BASE} the base model."
        ),
    ],
    member: Annotated[str | None, typer.Option(help="Member for all rows, in the place of the column member.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model; default: the one that the store names.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File of JSON lines to write.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass, of any members.")] = 64,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens after which a row is cut off.")] = 512,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Classify texts, or score them with reward models: each row by its own member of a store, mixed in one batch.

    Example: eigenpeft predict store rows.jsonl --out predictions.jsonl

    A row of the result has the member, the logits of its head, and the number of the label with the largest one.
    """
    quiet(as_json)
    if out is not None:
        check_file(out, overwrite=overwrite, inputs=[store, rows])
    table = open_rows(rows)
    members = _members(table, member, rows)
    texts = _texts(table, rows)
    opened = AdapterStore.from_pretrained(store)
    base = model or opened.subspace.info.base_model_name_or_path
    if base is None:
        raise EigenPeftError(f"The store {store!r} does not name its base model; pass it as --model.")
    tokenizer = open_tokenizer(base)
    classifier = _classifier(base, opened, set(members))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Classifiers on decoders read the last token that is not this one.
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    bank = AdapterBank.from_store(opened, names=sorted(set(members) - {BASE}))
    logits = classify_texts(
        bank, classifier, tokenizer, texts, members=members, batch_size=batch_size, max_length=max_length
    )
    predicted = [_row(name, each) for name, each in zip(members, logits, strict=True)]
    write_rows(predicted, out, overwrite=overwrite)
    if as_json:
        print_json({"store": store, "model": base, "rows": predicted})
        return
    show_rows(_shown(texts, predicted), predicted, out)


def _members(table: Dataset, member: str | None, path: Path) -> list[str]:
    """The member of each row."""
    if member is not None:
        return [member] * len(table)
    if "member" not in table.column_names:
        raise EigenPeftError(
            f"{str(path)!r} has the columns {table.column_names} and none is called member; name one member for all rows "
            "with --member, or add the column."
        )
    return _strings(table, "member", path)


def _texts(table: Dataset, path: Path) -> list[tuple[str, ...]]:
    """The text, or pair of texts, of each row."""
    if "text" not in table.column_names:
        raise EigenPeftError(f"{str(path)!r} has the columns {table.column_names}; it must have one called text.")
    columns = [name for name in ("text", "text_pair") if name in table.column_names]
    return list(zip(*(_strings(table, name, path) for name in columns), strict=True))


def _strings(table: Dataset, column: str, path: Path) -> list[str]:
    values = list(table[column])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise EigenPeftError(
                f"Row {row} of {str(path)!r} has {value!r:.60} in its column {column!r}; write a text."
            )
    return values


def _classifier(base: str, store: AdapterStore, members: set[str]) -> Any:
    """The base model with a classifier's head; a head that nobody trained is there only where every member has its own."""
    headless = sorted(name for name in members if name == BASE or not heads_of(name, store[name]))
    with without_load_reports():  # a new head is expected where each member has its own
        model, loading = AutoModelForSequenceClassification.from_pretrained(base, output_loading_info=True)
    if headless and loading["missing_keys"]:
        raise EigenPeftError(
            f"{', '.join(map(repr, headless[:5]))}{', ...' if len(headless) > 5 else ''} would answer with the head of the base "
            f"model, and {base!r} has no trained head for classification. Leave those rows out, or pass a classifier as --model."
        )
    return model.eval()


def _row(member: str, logits: Tensor) -> dict[str, Any]:
    values = logits.float().tolist()
    return {"member": member, "label": int(logits.argmax()) if len(values) > 1 else None, "logits": values}


def _shown(texts: list[tuple[str, ...]], predicted: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(predicted)} rows by {len({row['member'] for row in predicted})} members")
    for title in ("text", "member", "label", "logits"):
        table.add_column(title)
    for text, row in list(zip(texts, predicted, strict=True))[:SHOWN]:
        label = "-" if row["label"] is None else str(row["label"])
        logits = " ".join(f"{value:.3f}" for value in row["logits"][:8]) + (" ..." if len(row["logits"]) > 8 else "")
        table.add_row(shortened(" / ".join(text)), escape(row["member"]), label, logits)
    return table
