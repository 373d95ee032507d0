"""Text out of files that others wrote, made harmless where it is shown: in a terminal, in a card, in a card's code."""

import unicodedata
from typing import Any

# Control and format characters, halves of surrogate pairs, and separators of lines: escape sequences, text that runs backwards.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def for_terminal(text: Any) -> str:
    r"""Text whose control characters are shown, not sent; line breaks and tabs stay.

    Args:
        text: Anything; it is shown as `str` makes it.

    Example:
        >>> print(for_terminal("a\x1b[31mb"))
        a\x1b[31mb
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _HIDDEN else _named(char) for char in text
    )


def for_card(text: Any) -> str:
    """Text for a sentence or a table's cell of a Markdown card: no markup, no HTML, no link, no new line or cell.

    Args:
        text: Anything; None is nothing.

    Example:
        >>> print(for_card("[x](javascript:y) | <b>"))
        &#91;x&#93;(javascript:y) &#124; &lt;b&gt;
    """
    text = for_terminal("" if text is None else text).replace("&", "&amp;")
    for char, entity in (("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("[", "&#91;"), ("]", "&#93;"), ("`", "&#96;")):
        text = text.replace(char, entity)
    return " ".join(text.replace("\\", "&#92;").split())


def for_code(text: Any) -> str:
    r"""Text between backticks in a card, also inside a table: nothing in it ends the code, the cell or the line.

    Args:
        text: Anything.

    Example:
        >>> for_code("a` | b")
        "a' \\| b"
    """
    return " ".join(for_terminal(text).replace("`", "'").replace("|", "\\|").split())


def _named(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
