"""Rows from a file, and rows of a task as its model takes them."""

import codecs
import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from datasets.utils import logging as datasets_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)
from transformers.utils import logging as transformers_logging

from eigenpeft.audit.task.light_head import train_light_head
from eigenpeft.errors import EigenPeftError

_MAX_LENGTH = 512
_BLOCK = 2**20  # bytes read at a time
_READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}
_IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A model and tokenized rows with labels, ready for its loss."""

    model: nn.Module
    rows: list[dict[str, Any]]
    collator: Callable[[list[Any]], Any]


@contextmanager
def without_load_reports() -> Iterator[None]:
    """Transformers says nothing about heads that are new or resized, and draws no bar, while models are loaded as planned."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def open_rows(path: Path) -> Dataset:
    """The rows of a file, or of a folder that `datasets` saved.

    Args:
        path: .jsonl, .json, .csv, .parquet or a folder.

    Raises:
        EigenPeftError: If it is none of these, is damaged, or has no rows.
    """
    if path.is_dir():
        try:
            table = load_from_disk(path)
        except Exception as error:  # whatever datasets, Arrow or the file system raise
            raise EigenPeftError(f"{str(path)!r} is not a folder saved by datasets: {_reason(error)}") from error
        if not isinstance(table, Dataset):
            raise EigenPeftError(f"{str(path)!r} holds several splits, {sorted(table)}: pass the folder of one.")
        return table
    if not path.is_file():
        raise EigenPeftError(
            f"There is no file or folder {str(path)!r}; check the path, which is relative to {str(Path.cwd())!r}."
        )
    if path.suffix not in _READERS:
        raise EigenPeftError(
            f"{str(path)!r} must end in {', '.join(sorted(_READERS))}, or be a folder saved by datasets."
        )
    if not path.stat().st_size:
        raise EigenPeftError(f"{str(path)!r} is empty; it must hold at least one row.")
    if path.suffix != ".parquet":
        _check_utf8(path)
    verbosity, bars = datasets_logging.get_verbosity(), are_progress_bars_disabled()
    datasets_logging.set_verbosity(
        datasets_logging.CRITICAL
    )  # its log says the same as the error below, with a traceback
    disable_progress_bars()
    try:
        # The name is not a pattern: data[1].jsonl is that file.
        table = _READERS[path.suffix](glob.escape(str(path.absolute())))
    except Exception as error:  # whatever datasets, Arrow, pandas or the file system raise
        raise EigenPeftError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {_reason(error)}") from error
    finally:
        datasets_logging.set_verbosity(verbosity)
        if not bars:
            enable_progress_bars()
    if not len(table):
        raise EigenPeftError(f"{str(path)!r} has no rows; it must hold at least one.")
    return table


@contextmanager
def naming_the_base(model: str) -> Iterator[None]:
    """For the length of a block, a base model that transformers cannot load is named in the message.

    Args:
        model: Folder or Hub id.

    Raises:
        EigenPeftError: If the block cannot load it.
    """
    try:
        yield
    except OSError as error:
        raise EigenPeftError(
            f"The base model {model!r} cannot be loaded ({str(error).splitlines()[0][:120]}). Pass its folder, or an id that "
            "the Hub or its cache has, as --model."
        ) from error


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a base model, which is the first part of it that most commands open.

    Args:
        model: Folder or Hub id.

    Raises:
        EigenPeftError: If it cannot be loaded; the message names it.
    """
    with naming_the_base(model):
        return AutoTokenizer.from_pretrained(model)


def feature_column(table: Dataset, name: str, path: Path) -> Any:
    """A column of lists of numbers as one array, with the first row at fault named.

    Args:
        table: Rows.
        name: Column.
        path: Where they come from, for messages.

    Returns:
        (n, width) float32, memory-mapped where the file is.

    Raises:
        EigenPeftError: If a row is missing, is not a list of numbers, or has another length.
    """
    column = table.with_format("numpy")[name]
    first = table[0][name]
    width = len(first) if isinstance(first, list) else 0
    for row, value in enumerate(table[name]):
        good = isinstance(value, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        if not good or len(value) != width:
            shown = f"{len(value)} numbers" if good else f"{value!r:.60}"
            raise EigenPeftError(
                f"Row {row} of {str(path)!r} has {shown} in its column {name!r}; the first row has {width} numbers, and so "
                "must every row."
            )
    return column


def _check_utf8(path: Path) -> None:
    """Text that is not UTF-8 is found here: datasets would find it when a row is used."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise EigenPeftError(
                    f"{str(path)!r} is not UTF-8 text ({error.reason} near byte {start + error.start}); save it as UTF-8."
                ) from error
            start += len(block)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: datasets' own message names only itself."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    text = " ".join(str(error).split())
    return (text[:200] or type(error).__name__) + ("" if text.endswith(".") else ".")


def load_task(model: str, path: Path, *, n_rows: int, train_head: bool = False, seed: int = 0) -> LoadedTask:
    """A model and the first rows of a task: causal language modelling, or classification where rows have a label.

    Args:
        model: Folder or Hub id; for classification one with a trained head, unless `train_head`.
        path: Rows with `text`, `messages`, or `prompt` and `completion` (text or messages); or `text` and `label`.
        n_rows: Rows to read.
        train_head: Give a base a new head for the labels, trained lightly on these rows (`train_light_head`).
        seed: Seed of that head.

    Raises:
        EigenPeftError: If the columns are others, or the classifier has no trained head.
    """
    table = open_rows(path)
    columns = set(table.column_names)
    if train_head:
        return _with_light_head(model, path, columns, n_rows=n_rows, seed=seed)
    rows: list[Any] = list(islice(iter(table), n_rows))
    tokenizer = open_tokenizer(model)
    if {"text", "label"} <= columns:
        config = AutoConfig.from_pretrained(model)
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            raise EigenPeftError(
                f"{str(path)!r} has labels, but {model!r} holds {config.architectures}, no trained classifier: gradients "
                "behind a fresh head are those of a random direction. Add --train-head, which trains a head lightly on these rows "
                "first (the base rests, nothing is saved); or pass a classifier of this task to --model, such as the folder "
                "that `eigenpeft merge-base ADAPTER --out FOLDER` makes of an adapter and its own head."
            )
        classifier = AutoModelForSequenceClassification.from_pretrained(model)
        return LoadedTask(
            classifier,
            [_labelled(row, tokenizer, config, path) for row in rows],
            DataCollatorWithPadding(tokenizer),
        )
    _check_language_columns(columns, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenized = [_language(row, tokenizer) for row in rows]
    return LoadedTask(AutoModelForCausalLM.from_pretrained(model), tokenized, DataCollatorForSeq2Seq(tokenizer))


def _with_light_head(model: str, path: Path, columns: set[str], *, n_rows: int, seed: int) -> LoadedTask:
    if not {"text", "label"} <= columns:
        raise EigenPeftError(
            f"--train-head is for rows with text and label, and {str(path)!r} has {sorted(columns)}; leave it out."
        )
    task = load_new_task(model, path)
    torch.manual_seed(seed)
    with without_load_reports():
        classifier = task.make_model()
    rows = task.rows[:n_rows]
    train_light_head(classifier, rows, data_collator=task.collator, seed=seed)
    return LoadedTask(classifier, rows, task.collator)


@dataclass(frozen=True, eq=False)
class NewTask:
    """A base model to make again and again, and tokenized rows with labels."""

    make_model: Callable[[], Any]
    rows: list[dict[str, Any]]
    collator: Callable[[list[Any]], Any]
    task_type: str


def load_new_task(model: str, path: Path) -> NewTask:
    """A base model and all rows of a task that it was not trained on: a classifier gets a new head for the labels found.

    Args:
        model: Folder or Hub id.
        path: Rows with `text` and `label`; or `text`, `messages`, or `prompt` and `completion` for a language model.

    Raises:
        EigenPeftError: If the columns are others, or there is one label only.
    """
    table = open_rows(path)
    columns = set(table.column_names)
    rows: list[Any] = list(iter(table))
    tokenizer = open_tokenizer(model)
    if {"text", "label"} <= columns:
        classes = sorted({row["label"] for row in rows}, key=lambda label: (str(type(label)), label))
        if len(classes) < 2:
            raise EigenPeftError(f"{str(path)!r} has the label {classes} alone; a classifier needs two or more.")
        ids = {label: i for i, label in enumerate(classes)}
        names = {
            "id2label": {i: str(label) for label, i in ids.items()},
            "label2id": {str(label): i for label, i in ids.items()},
        }
        encoded = [
            {
                **tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=_MAX_LENGTH),
                "labels": ids[row["label"]],
            }
            for row in rows
        ]
        # A base that was a classifier of other labels gives up its head.
        settings: dict[str, Any] = {"num_labels": len(classes), "ignore_mismatched_sizes": True, **names}
        make = partial(AutoModelForSequenceClassification.from_pretrained, model, **settings)
        return NewTask(make, encoded, DataCollatorWithPadding(tokenizer), "SEQ_CLS")
    _check_language_columns(columns, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = [_language(row, tokenizer) for row in rows]
    make = partial(AutoModelForCausalLM.from_pretrained, model)
    return NewTask(make, encoded, DataCollatorForSeq2Seq(tokenizer), "CAUSAL_LM")


def _check_language_columns(columns: set[str], path: Path) -> None:
    if not ({"text"} <= columns or {"messages"} <= columns or {"prompt", "completion"} <= columns):
        raise EigenPeftError(
            f"{str(path)!r} has the columns {sorted(columns)}; a task has 'text', 'messages', or 'prompt' and 'completion' "
            "for a language model, or 'text' and 'label' for a classifier."
        )


def _labelled(row: dict[str, Any], tokenizer: Any, config: Any, path: Path) -> dict[str, Any]:
    label = row["label"]
    number = config.label2id.get(label) if isinstance(label, str) else label
    if not isinstance(number, int) or not 0 <= number < config.num_labels:
        raise EigenPeftError(
            f"{str(path)!r} has the label {label!r}; the classifier knows {sorted(config.label2id)} (or their numbers)."
        )
    return {**tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=_MAX_LENGTH), "labels": number}


def _language(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokens and labels; those of a prompt do not count."""
    if "prompt" in row and "completion" in row:
        start = _tokens(row["prompt"], tokenizer, generating=True)
        if isinstance(row["completion"], str):
            end = tokenizer(row["completion"] + (tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
        else:
            end = _tokens([*row["prompt"], *row["completion"]], tokenizer)[len(start) :]
        ids, labels = start + end, [_IGNORED] * len(start) + end
    else:
        ids = _tokens(row.get("messages") or row["text"], tokenizer)
        labels = list(ids)
    ids, labels = ids[-_MAX_LENGTH:], labels[-_MAX_LENGTH:]  # of a long row the end, where the completion is
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _tokens(text: str | list[dict[str, str]], tokenizer: Any, *, generating: bool = False) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(text, add_generation_prompt=generating, return_dict=True)["input_ids"]
