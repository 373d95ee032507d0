"""The command sync-adapters: the members of a store as the adapters of a running vLLM or SGLang server."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eigenpeft.cli.app import Json, app, console, print_json, quiet
from eigenpeft.engines import sync_adapters
from eigenpeft.report.markup import escape


@app.command("sync-adapters")
def sync(
    server: Annotated[str, typer.Option(help="Address of the server, such as http://localhost:8000.")],
    store: Annotated[str, typer.Option(help="Folder or Hub id of a store.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for plain LoRA folders; the server must see it by the same path."),
    ],
    member: Annotated[list[str] | None, typer.Option(help="A member to load; may be repeated. Default: all.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Load the members of a store into a running vLLM or SGLang server, and unload those that have gone.

    Example: eigenpeft sync-adapters --server http://localhost:8000 --store store --out loras
    """
    quiet(as_json)
    report = sync_adapters(server, store=store, out_dir=out, names=member, timeout=timeout)
    if as_json:
        print_json(asdict(report))
    else:
        console.print(
            f"Loaded {len(report.loaded)}, kept {len(report.kept)}, unloaded {len(report.unloaded)}, "
            f"failed {len(report.failed)}."
        )
        for failed, answer in report.failed.items():
            console.print(f"[red]{escape(failed)}[/red]: {escape(answer)}")
    if report.failed:
        raise typer.Exit(1)
