"""A task: which kind it is, its rows as its model takes them, the model and the collator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from eigenpeft.audit.task.light_head import train_light_head
from eigenpeft.cli.rows import open_rows, open_tokenizer, without_load_reports
from eigenpeft.collection import SourceAdapter
from eigenpeft.errors import EigenPeftError

_MAX_LENGTH = 512
_IGNORED = -100  # a label that no loss counts
_HEADS = {"classifier", "score", "classification_head"}
_LABELLED = {"text", "label"}


@dataclass(frozen=True)
class Columns:
    """Which columns have the texts and the labels.

    Attributes:
        text: Name; None for "text".
        label: Name; None for "label", where there is one.
    """

    text: str | None = None
    label: str | None = None


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A model and tokenized rows with labels, ready for its loss.

    Attributes:
        model: Language model or classifier; the classifier's head is trained.
        rows: Tokenized rows with labels.
        data_collator: Makes a batch of rows.
        kind: What the rows were taken for, in words.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    data_collator: Callable[[list[Any]], Any]
    kind: str


@dataclass(frozen=True, eq=False)
class NewTask:
    """A base model to make again and again, and tokenized rows with labels.

    Attributes:
        make_model: Makes the model.
        rows: Tokenized rows of the file, with labels.
        data_collator: Makes a batch of rows.
        task_type: PEFT's task type.
        kind: What the rows were taken for, in words.
        read: Reads another file of the same task into such rows.
    """

    make_model: Callable[[], Any]
    rows: list[dict[str, Any]]
    data_collator: Callable[[list[Any]], Any]
    task_type: str
    kind: str
    read: Callable[[Path], list[dict[str, Any]]]


def open_task(path: Path, *, columns: Columns, adapters: Sequence[SourceAdapter] = ()) -> tuple[Dataset, str]:
    """The rows of a task with their columns called text and label, and what they are taken for, in words.

    Args:
        path: Rows with `text` and `label` for a classifier; or `text`, `messages`, or `prompt` and `completion` (text or
            messages) for a language model.
        columns: Other names of text and label.
        adapters: Those that the task is held against. Where they are classifiers, rows with a text alone are refused.

    Raises:
        EigenPeftError: If a column is missing, or the rows have no labels and the adapters are classifiers.
    """
    raw = open_rows(path)
    table = _renamed(raw, path, columns)
    present = set(table.column_names)
    is_language = "messages" in present or {"prompt", "completion"} <= present
    heads = [each.name for each in adapters if _is_classifier(each)]
    if not present >= _LABELLED and not is_language and heads:
        raise EigenPeftError(
            f"{str(path)!r} has the columns {sorted(raw.column_names)}, and {len(heads)} of the {len(adapters)} adapters are "
            f"classifiers, such as {heads[0]!r}: their rows have a text and a label. Name the column of the labels with "
            "--label-column and that of the texts with --text-column, where they are not called 'label' and 'text'. (Rows of a "
            "language model have 'messages', or 'prompt' and 'completion'.)"
        )
    if present >= _LABELLED:
        used = [columns.text or "text", columns.label or "label", "text_pair"]
        return table, f"a classifier, by the columns {_named(used, raw)}{_rest(used, raw)}"
    if not ("text" in present or is_language):
        raise EigenPeftError(
            f"{str(path)!r} has the columns {sorted(raw.column_names)}; a task has 'text', 'messages', or 'prompt' and "
            "'completion' for a language model, or 'text' and 'label' for a classifier (--text-column and --label-column name "
            "others)."
        )
    pair, text = ["prompt", "completion"], columns.text or "text"
    used = pair if present >= set(pair) else ["messages"] if "messages" in present else [text]
    return table, f"a language model, by the columns {_named(used, raw)}{_rest(used, raw)}"


def _named(names: Sequence[str], table: Dataset) -> str:
    return ", ".join(name for name in names if name in table.column_names)


def _rest(used: Sequence[str], table: Dataset) -> str:
    others = [name for name in table.column_names if name not in used]
    return f" (not used: {', '.join(others)})" if others else ""


def _is_classifier(adapter: SourceAdapter) -> bool:
    return adapter.task_type == "SEQ_CLS" or any(_HEADS & set(key.split(".")) for key in adapter.kept_aside)


def _renamed(table: Dataset, path: Path, columns: Columns) -> Dataset:
    asked = {"text": columns.text, "label": columns.label}
    chosen = {name: to for to, name in asked.items() if name is not None}
    for name, to in chosen.items():
        if name not in table.column_names:
            raise EigenPeftError(
                f"{str(path)!r} has no column {name!r}, which --{to}-column names; its columns are {sorted(table.column_names)}."
            )
    if columns.text is not None and columns.text == columns.label:
        raise EigenPeftError(f"--text-column and --label-column both name {columns.text!r}; they must be two columns.")
    # A column of the standard name gives way to the one that was chosen for its place.
    table = table.remove_columns([to for to in chosen.values() if to in table.column_names and to not in chosen])
    return table.rename_columns(chosen) if chosen else table


def load_task(
    model: str,
    path: Path,
    *,
    n_rows: int,
    train_head: bool = False,
    seed: int = 0,
    columns: Columns = Columns(),
    adapters: Sequence[SourceAdapter] = (),
) -> LoadedTask:
    """A model and the first rows of a task: causal language modelling, or classification where rows have a label.

    Args:
        model: Folder or Hub id; for classification one with a trained head, unless `train_head`.
        path: As for `open_task`.
        n_rows: Rows to read.
        train_head: Give a base a new head for the labels, trained lightly on these rows (`train_light_head`).
        seed: Seed of that head.
        columns: Other names of text and label.
        adapters: Those that the task is held against.

    Raises:
        EigenPeftError: If the columns are others, or the classifier has no trained head.
    """
    table, kind = open_task(path, columns=columns, adapters=adapters)
    if train_head:
        return _with_light_head(model, path, columns, n_rows=n_rows, seed=seed)
    rows: list[Any] = list(islice(iter(table), n_rows))
    tokenizer = open_tokenizer(model)
    if set(table.column_names) >= _LABELLED:
        config = AutoConfig.from_pretrained(model)
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            raise EigenPeftError(
                f"{str(path)!r} has labels, but {model!r} holds {config.architectures}, no trained classifier: gradients "
                "behind a fresh head are those of a random direction. Add --train-head, which trains a head lightly on these rows "
                "first (the base rests, nothing is saved); or pass a classifier of this task to --model, such as the folder "
                "that `eigenpeft merge-base ADAPTER --out FOLDER` makes of an adapter and its own head."
            )
        classifier = AutoModelForSequenceClassification.from_pretrained(model)
        labelled = [_labelled(row, tokenizer, config, path) for row in rows]
        return LoadedTask(classifier, labelled, DataCollatorWithPadding(tokenizer), kind)
    tokenized = _language_rows(rows, tokenizer)
    return LoadedTask(AutoModelForCausalLM.from_pretrained(model), tokenized, DataCollatorForSeq2Seq(tokenizer), kind)


def _with_light_head(model: str, path: Path, columns: Columns, *, n_rows: int, seed: int) -> LoadedTask:
    task = load_new_task(model, path, columns=columns)
    if task.task_type != "SEQ_CLS":
        raise EigenPeftError(
            f"--train-head is for rows with text and label, and {str(path)!r} has {sorted(open_rows(path).column_names)}; "
            "leave it out, or name the labels with --label-column."
        )
    torch.manual_seed(seed)
    with without_load_reports():
        classifier = task.make_model()
    rows = task.rows[:n_rows]
    train_light_head(classifier, rows, data_collator=task.data_collator, seed=seed)
    return LoadedTask(classifier, rows, task.data_collator, task.kind)


def load_new_task(
    model: str, path: Path, *, columns: Columns = Columns(), adapters: Sequence[SourceAdapter] = ()
) -> NewTask:
    """A base model and all rows of a task that it was not trained on: a classifier gets a new head for the labels found.

    Args:
        model: Folder or Hub id.
        path: As for `open_task`.
        columns: Other names of text and label.
        adapters: Those that the task is held against.

    Raises:
        EigenPeftError: If the columns are others, or there is one label only.
    """
    table, kind = open_task(path, columns=columns, adapters=adapters)
    rows: list[Any] = list(iter(table))
    tokenizer = open_tokenizer(model)
    if not set(table.column_names) >= _LABELLED:
        make = partial(AutoModelForCausalLM.from_pretrained, model)
        read = partial(_read, columns=columns, encode=partial(_language_rows, tokenizer=tokenizer), has_labels=False)
        encoded = _language_rows(rows, tokenizer)
        return NewTask(make, encoded, DataCollatorForSeq2Seq(tokenizer), "CAUSAL_LM", kind, read)
    classes = sorted({row["label"] for row in rows}, key=lambda label: (str(type(label)), label))
    if len(classes) < 2:
        raise EigenPeftError(f"{str(path)!r} has the label {classes} alone; a classifier needs two or more.")
    ids = {label: i for i, label in enumerate(classes)}
    names = {
        "id2label": {i: str(label) for label, i in ids.items()},
        "label2id": {str(label): i for label, i in ids.items()},
    }
    # A base that was a classifier of other labels gives up its head.
    settings: dict[str, Any] = {"num_labels": len(classes), "ignore_mismatched_sizes": True, **names}
    make = partial(AutoModelForSequenceClassification.from_pretrained, model, **settings)
    encode = partial(_classified, ids=ids, tokenizer=tokenizer)
    read = partial(_read, columns=columns, encode=encode, has_labels=True)
    kind = kind.replace("a classifier", f"a classifier of {len(classes)} labels", 1)
    return NewTask(make, encode(rows), DataCollatorWithPadding(tokenizer), "SEQ_CLS", kind, read)


def _read(
    path: Path, *, columns: Columns, encode: Callable[[list[Any]], Any], has_labels: bool
) -> list[dict[str, Any]]:
    """Rows of another file of a task, which must have the same columns."""
    table, kind = open_task(path, columns=columns)
    if (set(table.column_names) >= _LABELLED) != has_labels:
        wanted = "text and label" if has_labels else "text, messages, or prompt and completion"
        raise EigenPeftError(
            f"The rows of {str(path)!r} are {kind}; those that are trained on are of the other kind. Give rows with {wanted}."
        )
    try:
        return encode(list(iter(table)))
    except KeyError as error:
        raise EigenPeftError(
            f"{str(path)!r} has the label {error.args[0]!r}, which none of the rows has that are trained on; leave such rows "
            "out, or train on rows of every label."
        ) from error


def _classified(rows: Sequence[Any], *, ids: dict[Any, int], tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            **tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=_MAX_LENGTH),
            "labels": ids[row["label"]],
        }
        for row in rows
    ]


def _labelled(row: dict[str, Any], tokenizer: Any, config: Any, path: Path) -> dict[str, Any]:
    label = row["label"]
    number = config.label2id.get(label) if isinstance(label, str) else label
    if not isinstance(number, int) or not 0 <= number < config.num_labels:
        raise EigenPeftError(
            f"{str(path)!r} has the label {label!r}; the classifier knows {sorted(config.label2id)} (or their numbers)."
        )
    return {**tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=_MAX_LENGTH), "labels": number}


def _language_rows(rows: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [_language(row, tokenizer) for row in rows]


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
