"""Rows of a task as the texts that are embedded."""

from collections.abc import Iterable, Mapping
from typing import Any

from eigenpeft.errors import EigenPeftError

_TEXT, _PAIR, _PROMPT, _MESSAGES = "text", "text_pair", "prompt", "messages"


def texts_of(rows: Iterable[Any]) -> list[str]:
    r"""What a row asks, as one text: answers and labels are left out, since a new task has none yet.

    Args:
        rows: Texts; or mappings with `text` (and `text_pair`), `prompt`, or `messages`, of which those of the assistant are
            left out.

    Raises:
        EigenPeftError: If a row is neither; its number is named.

    Examples:
        >>> texts_of(["Hello", {"text": "a", "text_pair": "b", "label": 1}, {"prompt": "What?", "completion": "That."}])
        ['Hello', 'a\nb', 'What?']
    """
    return [_text(row, number) for number, row in enumerate(rows)]


def _text(row: Any, number: int) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        parts = [row.get(_TEXT), row.get(_PAIR)] if row.get(_TEXT) is not None else [row.get(_PROMPT)]
        if parts == [None]:
            parts = [row.get(_MESSAGES)]
        texts = [text for part in parts if part is not None for text in _texts(part)]
        if texts and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
    shown = sorted(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
    raise EigenPeftError(
        f"Row {number} has no text: it is {shown}. Pass texts, or mappings with 'text' (and 'text_pair'), 'prompt' or 'messages'."
    )


def _texts(part: Any) -> list[Any]:
    """The texts of one field: itself, or those of messages that are not the assistant's."""
    if not isinstance(part, list | tuple):
        return [part]
    asked = [each for each in part if not (isinstance(each, Mapping) and each.get("role") == "assistant")]
    return [each.get("content") if isinstance(each, Mapping) else each for each in asked]
