"""The command demo: recycle related adapters for new customers, beside the controls."""

import warnings
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
    seed: Annotated[int, typer.Option(help="Seed of heads, adapters and batches.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Recycle sixteen related adapters for three new customers, beside the controls (2 to 4 minutes on 2 cores).

    Example: eigenpeft demo --out demo-output
    """
    quiet(as_json)
    transformers_logging.set_verbosity_error()  # a new head is expected, not worth a warning each time
    transformers_logging.disable_progress_bar()  # loading takes a tenth of a second
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries warn each other, not the user
        result = run_demo(
            out, seed=seed, overwrite=overwrite, progress=not as_json, report=lambda line: errors.print(escape(line))
        )
    if as_json:
        print_json(result.to_dict())
        return
    for question, answer in result.audit.items():
        console.print(f"[bold]{question}?[/bold] {escape(answer)}")
    console.print(demo_table(result))
    console.print(demo_verdict(result))
    console.print(f"Wrote subspace, store, plain-lora and demo.png to {escape(result.out)}.")
