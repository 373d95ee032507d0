"""Rows from a file, and the parts of a base model that commands open."""

import codecs
import glob
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from datasets.utils import logging as datasets_logging
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from eigenpeft.errors import EigenPeftError

_BLOCK = 2**20  # bytes read at a time
_RENAMED = r"`(is_)?gradient_checkpointing\w*` is deprecated"
_READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}


@contextmanager
def without_load_reports() -> Iterator[None]:
    """Transformers says nothing about heads that are new or resized, and draws no bar, while models are loaded as planned.

    PEFT asks every model for a name that transformers has renamed; of that warning nothing is shown either.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)
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
    check_there(path)
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


def check_there(path: str | Path) -> None:
    """Refuse the path of a file or folder that does not exist, before anything else is opened.

    Args:
        path: As typed.

    Raises:
        EigenPeftError: If nothing is there.
    """
    if not Path(path).exists():
        raise EigenPeftError(
            f"There is no file or folder {str(path)!r}; check the path, which is relative to {str(Path.cwd())!r}."
        )


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path, as no Hub id looks like it: it ends as a file of rows, or has a path's form.

    Args:
        name: As typed.

    Examples:
        >>> [looks_like_path(name) for name in ("train.jsonl", "data/rows.csv", "./data", "/data/x", "a/b/c")]
        [True, True, True, True, True]
        >>> [looks_like_path(name) for name in ("imdb", "trl-lib/tldr", "owner/name-v1.5")]
        [False, False, False]
    """
    return Path(name).suffix in _READERS or name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


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
