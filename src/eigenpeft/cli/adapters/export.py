"""The commands export and convert: a member of a store, a trained adapter, or the papers' own checkpoints, as plain LoRA."""

from pathlib import Path
from typing import Annotated

import typer

from eigenpeft.artifacts.reading import read_json
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.collection.formats.settings import OWN_METHODS
from eigenpeft.collection.opening import some
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners import EigenLoraConfig, convert_reference_checkpoint, export_gguf, export_lora
from eigenpeft.tuners.eigenlora.bases import find_bases


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a store; or folder of a trained EigenLoRA adapter.")
    ],
    out: Out,
    name: Annotated[str | None, typer.Argument(help="Name of an adapter in the store.")] = None,
    rank: Annotated[int | None, typer.Option(help="Smaller rank to truncate to, optimally; default: exact.")] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="peft: a folder that PEFT and vLLM load; gguf: a file for llama.cpp.")
    ] = "peft",
    base_model: Annotated[
        str | None,
        typer.Option(
            "--model", help="For gguf: folder or Hub id of the base model; default: the one that the store names."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one adapter, of a store or just trained, as an ordinary LoRA adapter that needs no eigenpeft.

    Example: eigenpeft export store my-adapter --out my-adapter-lora

    What a trainer saved, heads included: eigenpeft export my-task --out my-task-lora

    For llama.cpp: eigenpeft export store my-adapter --format gguf --out my-adapter.gguf
    """
    quiet(as_json)
    if file_format not in ("peft", "gguf"):
        raise EigenPeftError(f"--format {file_format!r} must be peft or gguf.")
    if base_model is not None and file_format != "gguf":
        raise EigenPeftError("--model is read for --format gguf alone; leave it out.")
    opened, name = _opened(source, name)
    if file_format == "gguf":
        export_gguf(opened, out, adapter_name=name, rank=rank, base_model=base_model, overwrite=overwrite)
    else:
        export_lora(opened, out, adapter_name=name, rank=rank, overwrite=overwrite)
    if as_json:
        print_json({"path": str(out), "adapter": name, "rank": rank, "format": file_format})
        return
    what = "LoRA file for llama.cpp" if file_format == "gguf" else "plain LoRA adapter"
    console.print(f"Wrote the {what} {escape(str(out))}.")


def _opened(source: str, name: str | None) -> tuple[AdapterStore, str]:
    """A store and the adapter's name in it: the store that was named, or one in memory of a single trained adapter."""
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        if name is None:
            names = AdapterStore.from_pretrained(source).names
            raise EigenPeftError(
                f"Which adapter of the store {source!r}? Name one of its {len(names)}: {some(names)}, as in: "
                f"eigenpeft export {source} {names[0] if names else 'NAME'} --out lora"
            )
        return AdapterStore.from_pretrained(source), name
    if name is not None:
        raise EigenPeftError(f"{source!r} is one adapter, no store; leave out the name {name!r}.")
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "EIGENLORA":
        way = (
            "load it with PEFT and call eigenpeft.export_lora(model, ...)"
            if kind in OWN_METHODS
            else "a plain LoRA needs no export, and other methods have none"
        )
        raise EigenPeftError(f"{source!r} is an adapter of peft_type {kind!r}; this command exports EIGENLORA: {way}.")
    subspace = find_bases(**EigenLoraConfig.from_pretrained(source).named_bases).subspace
    if subspace is None:
        raise EigenPeftError(
            f"{source!r} holds its bases in its own file (save_subspace='embed'); load it with PEFT and call "
            "eigenpeft.export_lora(model, ...)."
        )
    store = AdapterStore(subspace)
    store.add(source, name="trained")
    return store, "trained"


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
