"""The command push: upload a subspace, a store or an adapter with its model card."""

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi
from rich.markup import escape

from eigenpeft.cli.app import Json, app, console, print_json, quiet
from eigenpeft.errors import EigenPeftError

# A file of each kind of folder that can be pushed, in the order that they are looked for.
KINDS = {
    "store_config.json": "store",
    "subspace_config.json": "subspace",
    "adapter_config.json": "adapter",
}


def kind_of(folder: Path) -> str:
    """What a folder holds: "store", "subspace" or "adapter".

    Args:
        folder: Local folder.

    Raises:
        EigenPeftError: If it holds none of them, or no model card.
    """
    kind = next((kind for name, kind in KINDS.items() if (folder / name).is_file()), None)
    if kind is None:
        raise EigenPeftError(f"{folder} holds no subspace, store or adapter: none of {', '.join(KINDS)} is in it.")
    if not (folder / "README.md").is_file():
        raise EigenPeftError(f"{folder} has no README.md, the model card; save it again with save_pretrained.")
    return kind


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a subspace, a store or an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List what would be uploaded, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a folder to the Hub; log in first with `hf auth login`.

    Example: eigenpeft push subspace me/my-subspace --private --dry-run
    """
    quiet(as_json)
    kind = kind_of(folder)
    # The artifact's own files alone: checkpoints and optimizer states of a training stay here.
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".md"))
    url = None
    if not dry_run:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=message or f"Upload {kind}"
        )
        url = str(commit.commit_url)
    if as_json:
        print_json({"kind": kind, "repo_id": repo_id, "files": names, "url": url})
        return
    console.print(f"{'Would upload' if dry_run else 'Uploaded'} the {kind} {escape(str(folder))} to {escape(repo_id)}:")
    console.print(", ".join(map(escape, names)))
    if url:
        console.print(escape(url))
