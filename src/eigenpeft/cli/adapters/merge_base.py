"""The command merge-base: fold an adapter into its base model's weights."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from eigenpeft.artifacts.atomic import atomic_folder, check_output
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.report.markup import escape
from eigenpeft.tuners.files.merged_base import merge_into_base

_KIND = "merged model"


@app.command("merge-base")
def merge_base(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter of any PEFT method.")],
    out: Out,
    base: Annotated[str | None, typer.Option("--model", help="Base model; default: the one the adapter names.")] = None,
    num_labels: Annotated[int | None, typer.Option(help="Labels of a classifier's head.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base model with the adapter folded in: an ordinary model that needs neither PEFT nor eigenpeft.

    Example: eigenpeft merge-base my-task --out my-task-merged
    """
    quiet(as_json)
    check_output(out, kind=_KIND, overwrite=overwrite, inputs=[adapter])
    merged, base = merge_into_base(adapter, base=base, num_labels=num_labels)
    with atomic_folder(out, kind=_KIND, overwrite=overwrite, inputs=(adapter, base)) as scratch:
        merged.save_pretrained(scratch)
        if _has_tokenizer(base):
            AutoTokenizer.from_pretrained(base).save_pretrained(scratch)
    if as_json:
        print_json({"path": str(out), "adapter": adapter, "base": base})
        return
    console.print(f"Wrote the merged model {escape(str(out))}.")


def _has_tokenizer(base: str) -> bool:
    # A Hub id has one to be loaded; a local folder may hold the weights alone.
    return not Path(base).is_dir() or any(Path(base).glob("tokenizer*")) or (Path(base) / "vocab.txt").is_file()
