"""The command demo: recycle the shipped adapters for a new task, beside the controls."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from eigenpeft.cli.app import Json, Out, Overwrite, app, console, errors, print_json, quiet
from eigenpeft.demo.run import run_demo
from eigenpeft.demo.tables import demo_table, demo_verdict
from eigenpeft.report.markup import escape


@app.command()
def demo(
    out: Out = Path("demo-output"),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of every training.")] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Recycle ten shipped adapters for a task none of them saw, beside its controls (4 to 5 minutes on 2 cores).

    Example: eigenpeft demo --out demo-output
    """
    quiet(as_json)
    transformers_logging.set_verbosity_error()  # a new head is expected, not worth a warning each time
    result = run_demo(
        out, seeds=tuple(range(seeds)), overwrite=overwrite, report=lambda line: errors.print(escape(line))
    )
    if as_json:
        print_json(result.to_dict())
        return
    console.print(demo_table(result))
    console.print(demo_verdict(result))
    console.print(f"Wrote subspace, adapter, plain-lora and demo.png to {escape(result.out)}.")
