"""Links out of docs/ lead to the repository on the built site."""

import re

REPOSITORY = "https://github.com/eigenpeft/eigenpeft/blob/main/"


def on_page_markdown(markdown, **_):
    """Called by mkdocs for each page."""
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}", markdown)
