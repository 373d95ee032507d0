"""Text for rich's consoles: the one way in which names and messages reach a terminal."""

from typing import Any

from rich.markup import escape as escape_markup

from eigenpeft.artifacts.plain_text import for_terminal


def escape(text: Any) -> str:
    """Text as it is: no markup of rich in it, and its control characters shown.

    Args:
        text: Anything; it is shown as `str` makes it.
    """
    return escape_markup(for_terminal(text))
