"""The commands export and convert: a member of a store, or a checkpoint of the papers' own code, as a plain LoRA."""

from pathlib import Path
from typing import Annotated

import typer

from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners import convert_reference_checkpoint, export_gguf, export_lora


@app.command()
def export(
    store: Annotated[str, typer.Argument(help="Folder or Hub id of a store.")],
    name: Annotated[str, typer.Argument(help="Name of an adapter in it.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Smaller rank to truncate to, optimally; default: exact.")] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="peft: a folder that PEFT and vLLM load; gguf: a file for llama.cpp.")
    ] = "peft",
    base_model: Annotated[
        str | None,
        typer.Option(help="For gguf: folder or Hub id of the base model; default: the one that the store names."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one adapter of a store as an ordinary LoRA adapter that needs no eigenpeft.

    Example: eigenpeft export store my-adapter --out my-adapter-lora

    For llama.cpp: eigenpeft export store my-adapter --format gguf --out my-adapter.gguf
    """
    quiet(as_json)
    if file_format not in ("peft", "gguf"):
        raise EigenPeftError(f"--format {file_format!r} must be peft or gguf.")
    if base_model is not None and file_format != "gguf":
        raise EigenPeftError("--base-model is read for --format gguf alone; leave it out.")
    opened = AdapterStore.from_pretrained(store)
    if file_format == "gguf":
        export_gguf(opened, out, adapter_name=name, rank=rank, base_model=base_model, overwrite=overwrite)
    else:
        export_lora(opened, out, adapter_name=name, rank=rank, overwrite=overwrite)
    if as_json:
        print_json({"path": str(out), "adapter": name, "rank": rank, "format": file_format})
        return
    what = "LoRA file for llama.cpp" if file_format == "gguf" else "plain LoRA adapter"
    console.print(f"Wrote the {what} {escape(str(out))}.")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that the EigenLoRAx or MoSLoRA repository's code saved.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of the papers' own repositories as an ordinary LoRA adapter with the same update.

    Example: eigenpeft convert mrpc_eigenlora --out mrpc-lora
    """
    quiet(as_json)
    convert_reference_checkpoint(checkpoint, out, overwrite=overwrite)
    if as_json:
        print_json({"path": str(out), "checkpoint": str(checkpoint)})
        return
    console.print(f"Wrote the plain LoRA adapter {escape(str(out))}.")
