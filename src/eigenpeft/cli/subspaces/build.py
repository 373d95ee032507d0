"""The commands build, inspect and project: from adapters to a subspace, what it holds, and a store of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from eigenpeft.artifacts.atomic import check_file
from eigenpeft.artifacts.storage import STORE, SUBSPACE
from eigenpeft.building import SubspaceBuilder, build_subspace
from eigenpeft.building.work_folder import is_work_folder
from eigenpeft.cli.app import (
    Adapters,
    AllowDifferentBaseModels,
    Exclude,
    Json,
    Out,
    Overwrite,
    app,
    check_together,
    components,
    console,
    join_team,
    number_of_bytes,
    print_json,
    quiet,
)
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.report.markup import escape
from eigenpeft.report.plots import plot_spectra
from eigenpeft.report.summaries import store_summary, subspace_summary
from eigenpeft.report.tables import adapter_table, findings_text, module_table, sizes_text
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.subspace.stores.store_files import check_store_output

Components = Annotated[
    list[str] | None,
    typer.Option(
        "--n-components",
        "-k",
        help="Components per module: a number, a share such as 0.9, auto, or 'PATTERN=NUMBER', repeated. Default: 32, or all "
        "that a module has.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model", help="Hub id of the base model, in place of what the adapters' configs name (a local folder, say)."
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help="Memory for one module's tensors, such as 500MB; more adapters are merged in one pass."),
]
WorkDir = Annotated[Path | None, typer.Option(help="Folder for finished modules while building; default: OUT.work.")]
Share = Annotated[
    list[str] | None,
    typer.Option(
        help="'layers' for one bank for all layers of a kind, or a pattern of modules that share one; repeated."
    ),
]
Embeddings = Annotated[
    bool, typer.Option("--embeddings", help="Read the factors of embeddings too, which are otherwise kept aside.")
]


@app.command()
def build(
    adapters: Adapters,
    out: Out,
    n_components: Components = None,
    method: Annotated[str, typer.Option(help="balanced, hosvd, hooi, eigenlorax or paired.")] = "balanced",
    weighting: Annotated[str, typer.Option(help="equal or none.")] = "equal",
    n_pseudo_components: Annotated[int, typer.Option(help="Random directions to add to each module.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    exclude: Exclude = None,
    base_model: BaseModel = None,
    memory_limit: MemoryLimit = None,
    work_dir: WorkDir = None,
    share: Share = None,
    embeddings: Embeddings = False,
    allow_different_base_models: AllowDifferentBaseModels = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build a principal subspace from LoRA adapters of one base model.

    Example: eigenpeft build adapters/ --out subspace

    An interrupted build goes on when the same command is run again. Many processes share the modules among them:
    torchrun --nproc-per-node 2 -m eigenpeft build adapters/ --out subspace
    """
    team = join_team()
    quiet(as_json)
    builder = SubspaceBuilder(
        components(n_components) if n_components else None,
        method=method,  # pyright: ignore[reportArgumentType] (checked by fit)
        weighting=weighting,  # pyright: ignore[reportArgumentType]
        n_pseudo_components=n_pseudo_components,
        seed=seed,
        memory_limit=None if memory_limit is None else number_of_bytes(memory_limit),
        share="layers" if share == ["layers"] else share or None,
    )
    work = work_dir or Path(f"{out}.work")
    # With a work folder an interrupted build goes on, also one that was interrupted just after its result was written.
    resumes = is_work_folder(work)
    check_together(out, kind=SUBSPACE.label, overwrite=overwrite or resumes, inputs=[*adapters, work])
    with AdapterCollection.from_pretrained(
        adapters,
        base_model=base_model,
        allow_different_base_models=allow_different_base_models,
        embeddings=embeddings,
    ) as collection:
        kept = collection.without(*exclude) if exclude else collection
        builder.fit(kept, work_dir=work, keep_work_dir=True)
        alone = _alone(builder, kept) if share and team.is_main else None
    if team.is_main:
        _write_build(builder, out, alone, overwrite=overwrite, as_json=as_json)


def _write_build(
    builder: SubspaceBuilder, out: Path, alone: PrincipalSubspace | None, *, overwrite: bool, as_json: bool
) -> None:
    builder.subspace_.save_pretrained(out, overwrite=overwrite)
    builder.remove_work_dir()
    summary = subspace_summary(builder.subspace_, findings=builder.findings_)
    if as_json:
        print_json({"path": str(out), **summary})
        return
    _show_build(builder, summary, alone)
    console.print(f"Wrote {escape(str(out))} ({summary['bytes'] / 1e6:.2f} MB, sha256 {summary['sha256'][:12]}).")


def _show_build(builder: SubspaceBuilder, summary: dict[str, Any], alone: PrincipalSubspace | None) -> None:
    console.print(module_table(summary))
    if builder.findings_:
        console.print("Noticed about the adapters:")
        console.print(findings_text(builder.findings_))
    console.print(
        f"Explained share {summary['explained_share']:.3f} (mean over modules, of the adapters it was built from; it "
        "does not say that a new task will train well in it)."
    )
    if alone is not None:
        times = alone.n_bytes / summary["bytes"]
        console.print(
            f"{len(alone)} modules share {len(builder.subspace_.banks)} banks. A bank per module at the same K would explain "
            f"{alone.explained_share:.3f} and take {alone.n_bytes / 1e6:.2f} MB, {times:.1f} times as much."
        )
    if builder.subspace_.info.missed_share_bound is not None:
        console.print(
            f"Merged in one pass within --memory-limit: the components miss at most "
            f"{builder.subspace_.info.missed_share_bound:.2%} of a stack's squared norm against the best ones."
        )


def _alone(builder: SubspaceBuilder, collection: AdapterCollection) -> PrincipalSubspace | None:
    """What the same settings give without sharing, to compare; None where modules have fewer directions."""
    options = {"method": builder.method, "weighting": builder.weighting, "seed": builder.seed}
    counts = [bank.n_components for bank in builder.subspace_.values()]
    try:
        return build_subspace(collection, n_components=max(counts), **options)
    except SubspaceError:
        return None


@app.command()
def inspect(
    path_or_id: Annotated[str, typer.Argument(help="Folder or Hub id of a subspace or a store.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file to write the spectra to.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row per module, however many there are.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show components, explained share and condition of the modules, and a store's members with their sizes.

    Example: eigenpeft inspect subspace --plot spectra.png
    """
    quiet(as_json)
    if plot is not None:
        check_file(plot, overwrite=overwrite, inputs=[path_or_id])
    store = AdapterStore.from_pretrained(path_or_id) if (Path(path_or_id) / STORE.config_name).is_file() else None
    subspace = PrincipalSubspace.from_pretrained(path_or_id) if store is None else store.subspace
    summary = subspace_summary(subspace)
    members = store_summary(store) if store is not None else None
    if plot is not None:
        plot_spectra(subspace, plot, overwrite=overwrite)
    if as_json:
        sizes = ("bytes", "subspace_bytes", "original_bytes", "ratio")
        print_json(
            summary
            if members is None
            else summary | {"members": members["adapters"], "store": {name: members[name] for name in sizes}}
        )
        return
    console.print(module_table(summary, every=every))
    if members is not None:
        console.print(adapter_table(members))
        console.print(sizes_text(members, n_adapters=members["n_adapters"]))
    if plot is not None:
        console.print(f"Wrote {escape(str(plot))}.")


@app.command()
def project(
    subspace: Annotated[str, typer.Argument(help="Folder or Hub id of a subspace.")],
    adapters: Adapters,
    out: Out,
    exclude: Exclude = None,
    allow_different_base_models: AllowDifferentBaseModels = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put adapters into a new store: the bases, every adapter's core and head, and what the projection loses.

    Example: eigenpeft project subspace adapters/ --out store
    """
    quiet(as_json)
    check_store_output(out, overwrite=overwrite, inputs=[subspace, *adapters])
    opened = PrincipalSubspace.from_pretrained(subspace)
    with AdapterCollection.from_pretrained(
        adapters,
        allow_different_base_models=allow_different_base_models,
        embeddings=bool(opened.info.embeddings),
    ) as collection:
        kept = collection.without(*exclude) if exclude else collection
        store = AdapterStore.from_collection(opened, kept)
    store.save_pretrained(out, overwrite=overwrite)
    summary = store_summary(store)
    if as_json:
        print_json({"path": str(out), **summary})
        return
    console.print(adapter_table(summary))
    console.print(f"Wrote {escape(str(out))}. {sizes_text(summary, n_adapters=len(store))}")
