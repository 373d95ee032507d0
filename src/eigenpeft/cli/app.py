"""The `eigenpeft` command itself: the app that the commands join, its consoles, and how errors leave it."""

import json
import logging
import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console

from eigenpeft.artifacts.atomic import check_output
from eigenpeft.artifacts.plain_text import for_terminal
from eigenpeft.building.team import Team, share_threads
from eigenpeft.cli.messages import as_options
from eigenpeft.errors import (
    ArtifactError,
    CollectionError,
    EigenPeftError,
    LostProcessError,
    SubspaceError,
    is_out_of_memory,
)
from eigenpeft.report.markup import escape
from eigenpeft.version import __version__

# A launcher stops all processes 0.1 s after the first one fails; so long the silent ones let the main one print.
_TIME_TO_SPEAK = 1.0

app = typer.Typer(
    name="eigenpeft",
    help="Recycle LoRA adapters: build a subspace from many, train new tasks in it, export plain LoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

Adapters = Annotated[
    list[str],
    typer.Argument(help="Adapter folders, folders of adapter folders, or Hub ids (owner/name@revision), in any mix."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Name of an adapter to leave out; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what eigenpeft wrote there before; files of others are never replaced."),
]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts. Default: text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a classifier's labels. Default: label.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else.")]
AllowDifferentBaseModels = Annotated[
    bool, typer.Option(help="Take adapters whose configs name other base models, as long as shapes fit.")
]


class _PlainFormatter(logging.Formatter):
    """Records whose control characters are shown: they tell names from files."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done.")] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if version:
        console.print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: every foreseen error is one message on stderr and exit code 1, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A file or a pipe may take a code page without all letters ("Δ"): show "?" rather than end after the work is done.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except (EigenPeftError, OSError, KeyError) as error:
        # What is wrong with the input all processes of a launch find; what happens to one alone that one must tell.
        if console.quiet and isinstance(error, CollectionError | SubspaceError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, when the one that speaks is done first
            time.sleep(_TIME_TO_SPEAK)
            sys.exit(1)
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        told = as_options(str(message), typer.main.get_command(app), sys.argv[1:])
        errors.print(f"[red]Error:[/red] {escape(told)}", soft_wrap=True)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        errors.print("[red]Error:[/red] Memory does not suffice. Free some, or give the command less at a time.")
        sys.exit(1)


def check_together(path: Path, *, kind: str, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    """`check_output` in every process of a launch; one of them speaks.

    Args:
        path: Folder to write.
        kind: What it will hold.
        overwrite: Whether an artifact of this kind may be replaced.
        inputs: What is read.

    Raises:
        ArtifactError: If the folder must not be written.
    """
    try:
        check_output(path, kind=kind, overwrite=overwrite, inputs=inputs)
    except ArtifactError:
        if console.quiet:
            time.sleep(_TIME_TO_SPEAK)
            sys.exit(1)
        raise


def join_team() -> Team:
    """The processes of this launch; sees to it that one of them speaks and that each has its share of the cores."""
    share_threads()
    team = Team.of_this_launch()
    console.quiet = not team.is_main
    if team.size > 1:
        signal.signal(signal.SIGTERM, _stopped_by_launcher)
    return team


def _stopped_by_launcher(signum: int, frame: FrameType | None) -> None:
    """A launcher that finds one process dead stops the others: say so, and what to do, instead of just ending."""
    raise LostProcessError(
        "Stopped by the launcher, as when another process was killed or ran out of memory. What was finished is kept: run "
        "the same command again and it goes on from there."
    )


def components(values: Sequence[str]) -> int | float | str | dict[str, int | float | str]:
    """What `--n-components` asks for: one number, share or "auto" for all modules, or `PATTERN=NUMBER` once or more.

    Args:
        values: As typed.

    Raises:
        EigenPeftError: If a value is neither.
    """
    if len(values) == 1 and "=" not in values[0]:
        return _number_or_share(values[0])
    pairs = [value.rpartition("=") for value in values]
    return {pattern or "*": _number_or_share(value) for pattern, _, value in pairs}


def _number_or_share(text: str) -> int | float | str:
    if text == "auto":
        return text
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise EigenPeftError(
            f"--n-components {text!r} must be a whole number such as 32, a share such as 0.9, auto, or one of them for the "
            "modules of a pattern, such as '*.query=32'."
        ) from None


def number_of_bytes(text: str) -> int:
    """A size such as "500MB", "1.5GB" or "200000000".

    Args:
        text: As typed; units are powers of 1000, upper or lower case.

    Raises:
        EigenPeftError: If it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)b?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise EigenPeftError(f"{shown!r} is not a size in bytes; write it like 500MB, 1.5GB or 200000000.")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def quiet(as_json: bool) -> None:
    """No progress bars where the output is JSON.

    Args:
        as_json: Whether it is.
    """
    if as_json:
        disable_progress_bars()


def print_json(value: Any) -> None:
    """JSON on stdout, as it is: rich would wrap and colour what another program is to parse.

    Args:
        value: JSON-able; infinite numbers and NaN, which JSON has not, are written as null.
    """
    sys.stdout.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value with null for numbers that are not finite, at any depth.

    Args:
        value: JSON-able.
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
