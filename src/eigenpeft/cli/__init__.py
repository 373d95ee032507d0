"""The `eigenpeft` command: the modules that define its commands are imported when they are needed."""

import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from eigenpeft.version import __version__

TRL_SCRIPTS = ("distillation", "dpo", "grpo", "kto", "reward", "rloo", "sft")
# Command to the module that defines it. Importing all of them takes seconds.
COMMANDS = {
    "audit": "subspaces.audit",
    "build": "subspaces.build",
    "convert": "adapters.export",
    "demo": "demo",
    "doctor": "doctor",
    "export": "adapters.export",
    "index": "serving.which",
    "inspect": "subspaces.build",
    "lore": "training.lore",
    "merge": "adapters.merge",
    "merge-base": "adapters.merge_base",
    "predict": "serving.predict",
    "project": "subspaces.build",
    "push": "publish",
    "recipe": "recipe",
    "recycle": "training.recycle",
    "store": "serving.store",
    "sync-adapters": "serving.sync_adapters",
    "which": "serving.which",
    **dict.fromkeys(TRL_SCRIPTS, "training.trl"),
}


def main() -> None:
    """Entry point: imports what the command needs and runs it."""
    arguments = sys.argv[1:]
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    if word is not None and word not in COMMANDS:
        close = get_close_matches(word, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        sys.stderr.write(f"Error: there is no command {word!r}.{hint} The commands are {', '.join(COMMANDS)}.\n")
        sys.exit(2)
    try:
        load(word)
    except MemoryError:
        sys.stderr.write("Error: Memory does not suffice to load the command. Free some and try again.\n")
        sys.exit(1)
    import_module("eigenpeft.cli.app").main()


def load(command: str | None = None) -> Any:
    """The command line's app with one of its commands, or with all of them.

    Args:
        command: Name of the command; None loads all.
    """
    for module in [COMMANDS[command]] if command else sorted(set(COMMANDS.values())):
        import_module(f"eigenpeft.cli.{module}")
    return import_module("eigenpeft.cli.app").app
