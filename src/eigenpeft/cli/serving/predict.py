"""The command predict: rows of a file by classifiers or reward models of a store, each with its own core and head."""

import logging
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
from eigenpeft.collection.formats.labels import label_names
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape
from eigenpeft.subspace import AdapterStore
from eigenpeft.subspace.stores.changing import BASE
from eigenpeft.tuners.serving.bank import AdapterBank
from eigenpeft.tuners.serving.heads import heads_of
from eigenpeft.tuners.serving.texts import classify_texts

_logger = logging.getLogger(__name__)
_LANGUAGE_MODELS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@app.command()
def predict(
    store: Annotated[str, typer.Argument(help="Folder or Hub id of a store of classifiers or reward models.")],
    dataset: Annotated[
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

    For classifiers, regression and reward models alone; adapters of language models generate with an AdapterBank, or exported.

    Example: eigenpeft predict store rows.jsonl --out predictions.jsonl

    A row of the result has the member, the logits of its head, the number of the label with the largest one, and its name, where
    the adapter came with labels.json or a config.json that names its labels (id2label).
    """
    quiet(as_json)
    if out is not None:
        check_file(out, overwrite=overwrite, inputs=[store, dataset])
    table = open_rows(dataset)
    members = _members(table, member, dataset)
    texts = _texts(table, dataset)
    opened = AdapterStore.from_pretrained(store)
    base = model or opened.subspace.info.base_model_name_or_path
    if base is None:
        raise EigenPeftError(f"The store {store!r} does not name its base model; pass it as --model.")
    _check_kinds(store, opened, set(members))
    tokenizer = open_tokenizer(base)
    classifier = _classifier(base, opened, set(members))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Classifiers on decoders read the last token that is not this one.
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    bank = AdapterBank.from_store(opened, names=sorted(set(members) - {BASE}))
    logits = classify_texts(
        bank,
        model=classifier,
        processing_class=tokenizer,
        texts=texts,
        members=members,
        batch_size=batch_size,
        max_length=max_length,
    )
    n_outputs = {name: len(each) for name, each in zip(members, logits, strict=True)}
    names = {name: _label_names(opened, name, classifier, n_outputs=n) for name, n in n_outputs.items()}
    predicted = [_row(name, each, names[name]) for name, each in zip(members, logits, strict=True)]
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


def _check_kinds(store: str, opened: AdapterStore, members: set[str]) -> None:
    """Refuse members that answer with texts."""
    kinds = {name: opened[name].record.get("task_type") for name in sorted(members - {BASE})}
    generating = {name: kind for name, kind in kinds.items() if kind in _LANGUAGE_MODELS}
    if generating:
        name, kind = next(iter(generating.items()))
        more = f" and {len(generating) - 1} more" if len(generating) > 1 else ""
        raise EigenPeftError(
            f"{name!r}{more} of {store!r}: an adapter of a language model (task type {kind}), and predict is for classifiers, "
            "regression and reward models. To generate with several members in one batch, use AdapterBank.from_store and "
            "model.generate in Python ('A batch of a language model' in docs/serving.md); to generate with one, write it as a "
            f"plain LoRA: eigenpeft export {store} {name} --out {name}-lora"
        )


def _label_names(opened: AdapterStore, name: str, classifier: Any, *, n_outputs: int) -> list[str] | None:
    """The names of a member's labels; None where there are none, or not one for each output of its head."""
    found = label_names(classifier.config) if name == BASE else opened[name].record.get("labels")
    if not isinstance(found, list):
        return None
    if len(found) != n_outputs:
        _logger.warning(
            "%r has names for %d labels (%s) and its head has %d outputs: its labels are shown by number. Write a labels.json with "
            "%d names beside the adapter and add it to the store again with --replace.",
            name,
            len(found),
            ", ".join(map(str, found[:3])),
            n_outputs,
            n_outputs,
        )
        return None
    return found


def _row(member: str, logits: Tensor, names: list[str] | None) -> dict[str, Any]:
    values = logits.float().tolist()
    label = int(logits.argmax()) if len(values) > 1 else None
    name = names[label] if names and label is not None else None
    return {"member": member, "label": label, "label_name": name, "logits": values}


def _shown(texts: list[tuple[str, ...]], predicted: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(predicted)} rows by {len({row['member'] for row in predicted})} members")
    for title in ("text", "member", "label", "logits"):
        table.add_column(title)
    for text, row in list(zip(texts, predicted, strict=True))[:SHOWN]:
        label = "-" if row["label"] is None else str(row["label"])
        label += "" if row["label_name"] is None else f" {shortened(str(row['label_name']))}"
        logits = " ".join(f"{value:.3f}" for value in row["logits"][:8]) + (" ..." if len(row["logits"]) > 8 else "")
        table.add_row(shortened(" / ".join(text)), escape(row["member"]), label, logits)
    return table
