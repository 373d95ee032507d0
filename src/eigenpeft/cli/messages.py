"""Messages of the library in the words of a command: what it calls `overwrite=True` is `--overwrite` there."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# What is quoted and what stands in the brackets of a Python call is left as it is: it may be a path, and is not an argument.
_PARTS = re.compile(
    r"""(?P<kept>(?<!\w)'[^']*'(?!\w) | (?<!\w)"[^"]*"(?!\w) | `[^`]*` | [\w.]+\([^()]*\))
    | (?<![\w./-])(?P<name>[a-z][a-z_]*)=(?P<value>'[^']*' | "[^"]*" | [+-]?\d+(?:\.\d+)? | \w+ | (?![^\s,;:.)]))""",
    re.VERBOSE,
)
_TWICE = re.compile(r"(--[a-z-]+) \(\1 on the command line\)")
# What a message advises to call in Python, and the command that does it.
_CALLS = {
    "(AdapterStore.from_pretrained(...).add(...))": "(`eigenpeft store add`)",
    "Call refresh(), or open it again": "Run the command again",
    "another cache_dir": "another folder as --cache",
    "call compact() once (`eigenpeft store compact`)": "run `eigenpeft store compact` once",
    "with eigenpeft.export_lora, which can be projected": "with `eigenpeft export`, which can be projected",
    "with method='paired'": "with `eigenpeft build --method paired`",
    "with rebase()": "with `eigenpeft store rebase`",
    "with save_pretrained()": "with `hf download ID --local-dir FOLDER`",
}


def as_options(message: str, command: Any, words: Sequence[str]) -> str:
    """A message with the arguments that it names as options of the command that was typed, where that has them.

    Args:
        message: Message of the library, such as "pass another name=, replace=True, or remove that member first".
        command: The click command of the whole program.
        words: What was typed after the program's name.

    Examples:
        >>> import click
        >>> add = click.Command("add", params=[click.Option(["--replace"], is_flag=True), click.Option(["--name"])])
        >>> as_options("pass another name=, or replace=True", click.Group(commands={"add": add}), ["add", "store"])
        'pass another --name, or --replace'
    """
    options = _options(command, words)
    told = _TWICE.sub(r"\1", _PARTS.sub(lambda part: _as_option(part, options), message))
    for call, typed in _CALLS.items():
        told = told.replace(call, typed)
    return told


def _options(command: Any, words: Sequence[str]) -> Mapping[str, Any]:
    """Name in Python to option, of the command that the words name."""
    for word in words:
        if word.startswith("-"):
            continue  # only flags stand before a command's name
        inner = getattr(command, "commands", {})
        if word not in inner:
            break
        command = inner[word]
    return {one.name: one for one in command.params if one.param_type_name == "option"}


def _as_option(part: re.Match[str], options: Mapping[str, Any]) -> str:
    option = options.get(part["name"]) if part["name"] else None
    if option is None:
        return part[0]
    word, value = next((each for each in option.opts if each.startswith("--")), option.opts[0]), part["value"]
    if value == "None" or (value == "False" and not option.secondary_opts):
        return f"no {word}"
    if value == "False":
        return option.secondary_opts[0]
    if not value or (value == "True" and option.is_flag):
        return word
    return f"{word} {value.strip(chr(39) + chr(34)) or repr('')}"
