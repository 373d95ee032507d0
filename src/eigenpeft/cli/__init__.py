"""The `eigenpeft` command: the modules that define its commands are imported when they are needed."""

import sys
from difflib import get_close_matches
from importlib import import_module
from shutil import get_terminal_size
from textwrap import fill
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

# Name of a command to the first line of its help, so that the list of commands needs none of them. A test holds them together.
SHORT_HELP = {
    "audit": "Say what can be done with adapters: compress them, train a new task from them, reuse one. Seconds to minutes.",
    "build": "Build a principal subspace from LoRA adapters of one base model.",
    "convert": "Write a checkpoint of the papers' own repositories as an ordinary LoRA adapter with the same update.",
    "demo": "Recycle sixteen related adapters for three new customers, beside the controls (2 to 4 minutes on 2 cores).",
    "distillation": "On-policy distillation from a teacher in a recycled subspace: TRL's own `distillation` script, its flags "
    "and ours.",
    "doctor": "Show versions, what is missing, and which quantisation back-ends import here.",
    "dpo": "Direct preference optimisation in a recycled subspace: TRL's own `dpo` script, its flags and ours.",
    "export": "Write one adapter, of a store or just trained, as an ordinary LoRA adapter that needs no eigenpeft.",
    "grpo": "Group relative policy optimisation in a recycled subspace: TRL's own `grpo` script, its flags and ours.",
    "index": "Embed a few rows of each adapter's task, so that `eigenpeft which` can name the adapter for other rows.",
    "inspect": "Show components, explained share and condition of the modules, and a store's members with their sizes.",
    "kto": "Kahneman-Tversky optimisation in a recycled subspace: TRL's own `kto` script, its flags and ours.",
    "lore": "Personalised reward models: one reward basis, a few numbers per user (LoRe).",
    "merge": "Merge LoRA adapters of one base model, whatever their ranks and alphas, into one plain LoRA.",
    "merge-base": "Write the base model with the adapter folded in: an ordinary model that needs neither PEFT nor eigenpeft.",
    "predict": "Classify texts, or score them with reward models: each row by its own member of a store, mixed in one batch.",
    "project": "Put adapters into a new store: the bases, every adapter's core and head, and what the projection loses.",
    "push": "Publish a subspace, a store, a trained adapter or a reward model on the Hub, with a card that needs no editing.",
    "recipe": "Copy a recipe: one script that you run and change, and the file with its settings.",
    "recycle": "Try what adapters can give to a new task beside fresh LoRAs, and train the best on all rows.",
    "reward": "Reward modelling in a recycled subspace: TRL's own `reward` script, its flags and ours.",
    "rloo": "REINFORCE leave-one-out in a recycled subspace: TRL's own `rloo` script, its flags and ours.",
    "sft": "Supervised fine-tuning in a recycled subspace: TRL's own `sft` script, its flags and ours.",
    "store": "Stores of many adapters in one subspace: add, absorb, list, remove, rename, compact, rebase.",
    "sync-adapters": "Load the members of a store into a running vLLM or SGLang server, and unload those that have gone.",
    "which": "Name the adapter for rows of a task, with scores and how sure the first name is.",
}
_USAGE = """Usage: eigenpeft [OPTIONS] COMMAND [ARGS]...

  Recycle LoRA adapters: build a subspace from many, train new tasks in it, export plain LoRA.

Options:
  --version      Print the version and stop.
  -v, --verbose  Log what is being done.
  -h, --help     Show this message and exit. `eigenpeft COMMAND --help` shows that of a command.

Commands:
"""


def main() -> None:
    """Entry point: imports what the command needs and runs it."""
    arguments = sys.argv[1:]
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE + _commands())
        sys.exit(0 if arguments else 2)
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


def _commands() -> str:
    """A paragraph per command."""
    width = max(map(len, SHORT_HELP)) + 4
    return "".join(
        fill(text, get_terminal_size().columns, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
        + "\n"
        for name, text in SHORT_HELP.items()
    )


def load(command: str | None = None) -> Any:
    """The command line's app with one of its commands, or with all of them.

    Args:
        command: Name of the command; None loads all.
    """
    for module in [COMMANDS[command]] if command else sorted(set(COMMANDS.values())):
        import_module(f"eigenpeft.cli.{module}")
    return import_module("eigenpeft.cli.app").app
