"""The `eigenpeft` command: parses, calls the library, prints."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.run import run_demo
from eigenpeft.demo.tables import demo_table, demo_verdict
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.plots import plot_spectra
from eigenpeft.report.summaries import store_summary, subspace_summary
from eigenpeft.report.tables import adapter_table, findings_text, module_table
from eigenpeft.subspace import CoefficientStore, PrincipalSubspace, SubspaceBuilder
from eigenpeft.tuners.export import export_lora
from eigenpeft.version import __version__

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
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command()
def build(
    adapters: Adapters,
    out: Out,
    n_components: Annotated[
        str, typer.Option("--n-components", "-k", help="Components a module: a number, or a share such as 0.9.")
    ] = "32",
    method: Annotated[str, typer.Option(help="balanced, hosvd, hooi or eigenlorax.")] = "balanced",
    weighting: Annotated[str, typer.Option(help="equal or energy.")] = "equal",
    n_pseudo_components: Annotated[int, typer.Option(help="Random directions to add to each module.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Name of an adapter to leave out; may be repeated.")] = None,
    allow_different_base_models: Annotated[
        bool, typer.Option(help="Take adapters whose configs name other base models, as long as shapes fit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a principal subspace from LoRA adapters of one base model.

    Example: eigenpeft build adapters/ --n-components 32 --out subspace
    """
    _quiet(as_json)
    with AdapterCollection.from_pretrained(
        adapters, allow_different_base_models=allow_different_base_models
    ) as collection:
        kept = collection.without(*exclude) if exclude else collection
        builder = SubspaceBuilder(
            _number_or_share(n_components),
            method=method,  # pyright: ignore[reportArgumentType] (checked by fit)
            weighting=weighting,  # pyright: ignore[reportArgumentType]
            n_pseudo_components=n_pseudo_components,
            seed=seed,
        ).fit(kept)
    builder.subspace_.save_pretrained(out)
    summary = subspace_summary(builder.subspace_, findings=builder.findings_)
    if as_json:
        _print_json({"path": str(out), **summary})
        return
    console.print(module_table(summary))
    if builder.findings_:
        console.print("Noticed about the adapters:")
        console.print(findings_text(builder.findings_))
    console.print(
        f"Explained share {summary['explained_share']:.3f} (mean over modules, of the adapters it was built from; it "
        "does not say that a new task will train well in it)."
    )
    console.print(f"Wrote {escape(str(out))} ({summary['bytes'] / 1e6:.2f} MB, sha256 {summary['sha256'][:12]}).")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a subspace or a store.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file to write the spectra to.")] = None,
    as_json: Json = False,
) -> None:
    """Show components, explained share and condition of every module.

    Example: eigenpeft inspect subspace --plot spectra.png
    """
    _quiet(as_json)
    subspace = PrincipalSubspace.from_pretrained(path)
    summary = subspace_summary(subspace)
    if plot is not None:
        plot_spectra(subspace, plot)
    if as_json:
        _print_json(summary)
        return
    console.print(module_table(summary))
    if plot is not None:
        console.print(f"Wrote {escape(str(plot))}.")


@app.command()
def project(
    subspace: Annotated[str, typer.Argument(help="Folder or Hub id of a subspace.")],
    adapters: Adapters,
    out: Out,
    allow_different_base_models: Annotated[
        bool, typer.Option(help="Take adapters whose configs name other base models, as long as shapes fit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put adapters into a subspace: one file with the bases and every adapter's coefficients, and what that loses.

    Example: eigenpeft project subspace adapters/ --out store
    """
    _quiet(as_json)
    bases = PrincipalSubspace.from_pretrained(subspace)
    with AdapterCollection.from_pretrained(
        adapters, allow_different_base_models=allow_different_base_models
    ) as collection:
        store = CoefficientStore.from_collection(bases, collection)
    store.save_pretrained(out)
    summary = store_summary(store)
    if as_json:
        _print_json({"path": str(out), **summary})
        return
    console.print(adapter_table(summary))
    console.print(
        f"Wrote {escape(str(out))}: {len(store)} adapters in {summary['bytes'] / 1e6:.2f} MB, of which the shared "
        f"bases are {summary['subspace_bytes'] / 1e6:.2f} MB."
    )


@app.command()
def export(
    store: Annotated[str, typer.Argument(help="Folder or Hub id of a store.")],
    name: Annotated[str, typer.Argument(help="Name of an adapter in it.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Smaller rank to truncate to, optimally; default: exact.")] = None,
    as_json: Json = False,
) -> None:
    """Write one adapter of a store as an ordinary LoRA adapter that needs no eigenpeft.

    Example: eigenpeft export store my-adapter --out my-adapter-lora
    """
    _quiet(as_json)
    export_lora(CoefficientStore.from_pretrained(store), out, adapter_name=name, rank=rank)
    if as_json:
        _print_json({"path": str(out), "adapter": name, "rank": rank})
        return
    console.print(f"Wrote the plain LoRA adapter {escape(str(out))}.")


@app.command()
def demo(
    out: Out = Path("demo-output"),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of every training.")] = 1,
    as_json: Json = False,
) -> None:
    """Recycle ten shipped adapters for a task none of them saw, beside its controls (about 4 minutes on 2 cores).

    Example: eigenpeft demo --out demo-output
    """
    _quiet(as_json)
    transformers_logging.set_verbosity_error()  # a new head is expected, not worth a warning each time
    result = run_demo(out, seeds=tuple(range(seeds)), report=lambda line: errors.print(escape(line)))
    if as_json:
        _print_json(result.to_dict())
        return
    console.print(demo_table(result))
    console.print(demo_verdict(result))
    console.print(f"Wrote subspace, adapter, plain-lora and demo.png to {escape(result.out)}.")


def main() -> None:
    """Entry point: every foreseen error is one message on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (EigenPeftError, OSError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors.print(f"[red]Error:[/red] {escape(str(message))}", soft_wrap=True)
        sys.exit(1)


def _number_or_share(text: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise EigenPeftError(
            f"--n-components {text!r} must be a whole number such as 32, or a share such as 0.9."
        ) from None


def _quiet(as_json: bool) -> None:
    if as_json:
        disable_progress_bars()


def _print_json(value: Any) -> None:
    # Plain print: rich would wrap and colour what another program is to parse.
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
