"""The command push: send a saved subspace, store, adapter or reward model to the Hub, with its card."""

from pathlib import Path
from typing import Annotated

import typer

from eigenpeft.artifacts.reading import read_json
from eigenpeft.audit import AuditReport
from eigenpeft.cli.app import Json, app, console, print_json, quiet
from eigenpeft.errors import ArtifactError
from eigenpeft.publish import prepare
from eigenpeft.publish import push as push_publication
from eigenpeft.report.markup import escape


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved subspace, store, adapter or reward model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made when it does not exist.")],
    subspace: Annotated[str | None, typer.Option(help="Hub id of an adapter's subspace, if it names a folder.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--model", help="Hub id of an adapter's base model, if it names a folder.")
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of `eigenpeft audit --json` on the same adapters; its table and figure go into the card."
        ),
    ] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's id of the license, such as apache-2.0.")] = None,
    with_users: Annotated[
        bool, typer.Option("--with-users", help="Send the weights of a reward model's users too: data about people.")
    ] = False,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a subspace, a store, a trained adapter or a reward model on the Hub, with a card that needs no editing.

    Example: eigenpeft push subspace owner/my-subspace --dry-run
    """
    quiet(as_json)
    report = None if audit is None else _read_report(audit)
    publication = prepare(
        folder,
        repo_id=repo_id,
        subspace=subspace,
        base_model=base_model,
        audit=report,
        license=license,
        with_users=with_users,
    )
    url = None if dry_run else push_publication(publication, private=private)
    files = ["README.md", *publication.files, *publication.made]
    if as_json:
        print_json({"kind": publication.kind, "repo_id": repo_id, "files": files, "url": url, "card": publication.card})
        return
    if dry_run:
        console.print(publication.card, markup=False, highlight=False)
        console.print(f"Would send {', '.join(files)} to {escape(repo_id)}.")
        return
    console.print(f"Sent the {publication.kind}: {escape(str(url))}")


def _read_report(path: Path) -> AuditReport:
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"--audit {str(path)!r} cannot be read as JSON ({error}); write it with `eigenpeft audit ADAPTERS --json`."
        ) from error
    return AuditReport.from_dict(data)
