"""The command recipe: list the recipes that come with eigenpeft, or copy one, script and settings, to change it."""

import ast
from pathlib import Path
from typing import Annotated

import typer

import eigenpeft
from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.cli.app import Json, app, console, print_json
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape

_PACKAGE = Path(eigenpeft.__file__).parent
# In a wheel they lie inside the package; in a checkout beside `src`.
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")


@app.command()
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="Name of a recipe, such as classification; without it, all are listed.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder to copy it to.")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe: one script that you run and change, and the file with its settings.

    Example: eigenpeft recipe classification --to my-task
    """
    found = recipes()
    if name is None:
        if as_json:
            print_json({own: _first_line(path) for own, path in found.items()})
            return
        for own, path in found.items():
            console.print(f"[bold]{own}[/bold]  {escape(_first_line(path))}", soft_wrap=True)
        return
    if name not in found:
        raise EigenPeftError(f"There is no recipe {name!r}; the recipes are {', '.join(found)}.")
    copied = [to / path.name for path in _files(found[name])]
    there = [str(path) for path in copied if path.exists()]
    if there and not overwrite:
        raise EigenPeftError(f"{', '.join(there)} exists; pass --overwrite to replace it, or another folder with --to.")
    to.mkdir(parents=True, exist_ok=True)
    for source, target in zip(_files(found[name]), copied, strict=True):
        with atomic_file(target, overwrite=overwrite) as scratch:
            scratch.write_bytes(source.read_bytes())
    if as_json:
        print_json({"recipe": name, "files": [str(path) for path in copied]})
        return
    console.print(f"Copied {escape(', '.join(map(str, copied)))}. The script's first lines say how to run it.")


def recipes() -> dict[str, Path]:
    """Name to script of every recipe.

    Raises:
        EigenPeftError: If this installation has none.
    """
    folder = next((place for place in _PLACES if (place / "classification.py").is_file()), None)
    if folder is None:
        raise EigenPeftError("This installation of eigenpeft came without its recipes; install the wheel, or clone it.")
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def _files(script: Path) -> list[Path]:
    return [script, *sorted(script.parent.glob(f"{script.stem}*.yaml"))]


def _first_line(script: Path) -> str:
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]
