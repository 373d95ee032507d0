"""The commands store add, absorb, list, remove, rename, compact and rebase."""

from pathlib import Path
from typing import Annotated, Any

import typer

from eigenpeft.artifacts.reading import read_json
from eigenpeft.cli.app import (
    Adapters,
    AllowDifferentBaseModels,
    Json,
    Out,
    Overwrite,
    app,
    console,
    print_json,
    quiet,
)
from eigenpeft.collection.formats.settings import CONFIG_NAME
from eigenpeft.collection.formats.weights import BIN_NAME, SAFETENSORS_NAME
from eigenpeft.errors import EigenPeftError
from eigenpeft.report.markup import escape
from eigenpeft.report.summaries import absorb_summary, member_summary, store_sizes, store_summary
from eigenpeft.report.tables import absorb_table, adapter_table, sizes_text
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.subspace.stores.moving import move_member
from eigenpeft.subspace.stores.store_files import check_store_output, renew_card

store_app = typer.Typer(
    help="Stores of many adapters in one subspace: add, absorb, list, remove, rename, compact, rebase.",
    no_args_is_help=True,
)
app.add_typer(store_app, name="store")

_MUCH_LOST = 0.5  # mean error above which a member is warned of: a quarter of its squared norm is gone
_MOST_READ = 1000  # members that are read for the size of the whole store
Store = Annotated[str, typer.Argument(help="Folder of a store.")]


@store_app.command()
def add(
    store: Store,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of EigenLoRA or LoRA adapters, folders of such folders, Hub ids, or STORE#MEMBER, in any mix."
        ),
    ],
    subspace: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a subspace: make the store if it is not there yet.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the one adapter that is added; default: its folder's.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of members of the same name.")] = False,
    allow_different_base_models: AllowDifferentBaseModels = False,
    as_json: Json = False,
) -> None:
    """Add adapters, each written alone: trained EigenLoRA as it is, LoRA by projection; heads are kept.

    Example: eigenpeft store add store my-trained-adapter --subspace subspace
    """
    quiet(as_json)
    each = [one for source in sources for one in _adapters_in(source)]
    if name is not None and len(each) != 1:
        raise EigenPeftError(f"--name {name!r} goes with one adapter, and {len(each)} are named; leave it out.")
    opened = _open_or_make(store, subspace)
    added: dict[str, Any] = {}
    options: dict[str, Any] = {"replace": replace, "allow_different_base_models": allow_different_base_models}
    try:
        for source in each:
            before = set(opened.names)
            member = opened.add(source, name=name, **options)
            own = name or next((other for other in opened.names if other not in before), str(member.record.get("name")))
            added[own] = member_summary(member, opened.subspace)
    finally:
        if added:  # also where a later one was refused
            _renew_card(opened, store, as_json)
    # Of a large store only what was added: every member would have to be read.
    sizes = store_sizes(opened) if len(opened) <= _MOST_READ else {}
    if as_json:
        print_json({"path": store, "added": added, "n_adapters": len(opened), **sizes})
        return
    console.print(adapter_table({"adapters": added}))
    console.print(f"Added {len(added)} to {escape(store)}, which has {len(opened)} adapters now.")
    if sizes:
        console.print(sizes_text(sizes, n_adapters=len(opened)))
    for own, summary in added.items():
        if (error := summary["mean_error"]) is not None and error > _MUCH_LOST:
            console.print(
                f"{escape(own)} may not do what it did: the store's bases hold {1 - error**2:.0%} of its update (mean error "
                f"{error:.2f}). `eigenpeft store absorb {escape(store)} ADAPTER --replace` lets the bases grow by what they lack; "
                "the other adapters stay as they are."
            )


@store_app.command("list")
def list_members(store: Store, as_json: Json = False) -> None:
    """Show every member: its core, rank, size and its LoRA's, what it keeps besides, and what its projection lost.

    Example: eigenpeft store list store
    """
    quiet(as_json)
    summary = store_summary(AdapterStore.from_pretrained(store))
    if as_json:
        print_json({"path": store, **summary})
        return
    console.print(adapter_table(summary))
    console.print(sizes_text(summary, n_adapters=summary["n_adapters"]))


@store_app.command()
def remove(
    store: Store,
    names: Annotated[list[str], typer.Argument(help="Names of members.")],
    as_json: Json = False,
) -> None:
    """Remove members; their bytes go with the next compact.

    Example: eigenpeft store remove store old-adapter
    """
    quiet(as_json)
    opened = AdapterStore.from_pretrained(store)
    for name in names:
        opened[name]  # so that an unknown name stops before anything is removed
    for name in names:
        opened.remove(name)
    _renew_card(opened, store, as_json)
    _done({"path": store, "removed": names, "n_adapters": len(opened)}, as_json, f"Removed {len(names)}.")


@store_app.command()
def rename(
    store: Store,
    name: Annotated[str, typer.Argument(help="Name of a member.")],
    new_name: Annotated[str, typer.Argument(help="Its new name.")],
    as_json: Json = False,
) -> None:
    """Give a member another name.

    Example: eigenpeft store rename store checkpoint-500 customer-17
    """
    quiet(as_json)
    opened = AdapterStore.from_pretrained(store)
    opened.rename(name, new_name)
    _renew_card(opened, store, as_json)
    _done({"path": store, "renamed": {name: new_name}}, as_json, f"Renamed {name!r} to {new_name!r}.")


@store_app.command()
def compact(store: Store, as_json: Json = False) -> None:
    """Join the members' files, drop what was removed, and bring a store of an older version up.

    Example: eigenpeft store compact store
    """
    quiet(as_json)
    opened = AdapterStore.from_pretrained(store)
    freed = opened.compact()
    text = f"{len(opened)} adapters, {max(freed, 0) / 1e6:.2f} MB became free."
    _done({"path": store, "n_adapters": len(opened), "freed_bytes": freed}, as_json, text)


@store_app.command()
def absorb(
    store: Store,
    adapters: Adapters,
    held_share: Annotated[
        float, typer.Option(help="Share of the new adapters' squared update norms that the bases are to hold, up to 1.")
    ] = 0.95,
    max_components: Annotated[
        int | None,
        typer.Option(help="Largest number of components; beyond it all members are moved, with their loss reported."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of members of the same name.")] = False,
    allow_different_base_models: AllowDifferentBaseModels = False,
    as_json: Json = False,
) -> None:
    """Add LoRA adapters and let the bases grow by the directions they lack; the members there are stay as they are.

    Example: eigenpeft store absorb store new-adapters --held-share 0.99
    """
    quiet(as_json)
    opened = AdapterStore.from_pretrained(store)
    report = opened.absorb(
        adapters,
        held_share=held_share,
        max_components=max_components,
        replace=replace,
        allow_different_base_models=allow_different_base_models,
    )
    summary = absorb_summary(report)
    if as_json:
        print_json({"path": store, **summary, "n_adapters": len(opened)})
        return
    console.print(absorb_table(summary))
    console.print(
        f"Absorbed {len(report.absorbed)} into {escape(store)}, which has {len(opened)} adapters now. Of the new adapters' "
        f"squared norms the bases held {report.held_before:.1%} and hold {report.held_after:.1%}. "
        + (
            "No other member changed."
            if report.is_exact
            else f"{len(report.lost)} members moved and lost {max(report.lost.values()):.1%} of their updates' norms at most."
        )
    )


@store_app.command()
def rebase(
    store: Annotated[str, typer.Argument(help="Folder of a store; or of EigenLoRA adapters, which make a new store.")],
    subspace: Annotated[str, typer.Argument(help="Folder or Hub id of the new subspace, of the same modules.")],
    out: Out,
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--from", help="Subspace that EigenLoRA adapters were trained on; default: what their configs name."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a store with all members, or trained EigenLoRA adapters, moved to other bases, and show what that loses.

    Example: eigenpeft store rebase store wider-subspace --out wider-store
    """
    quiet(as_json)
    check_store_output(out, overwrite=overwrite, inputs=[store, subspace])
    target = PrincipalSubspace.from_pretrained(subspace)
    # A store that is replaced stays until all members have moved.
    if any(_is_adapter(Path(folder)) for folder in _adapters_in(store)):
        moved = _rebase_adapters(_adapters_in(store), target, trained_on=trained_on)
    else:
        moved = AdapterStore.from_pretrained(store).rebase(target, out_dir=None if out.exists() else out)
    if moved.folder is None:
        moved.save_pretrained(out, overwrite=overwrite)
    summary = store_summary(moved)
    if as_json:
        print_json({"path": str(out), **summary})
        return
    console.print(adapter_table(summary))
    console.print(f"Wrote {escape(str(out))}. {sizes_text(summary, n_adapters=len(moved))}")


def _renew_card(opened: AdapterStore, store: str, as_json: bool) -> None:
    """Write the store's README.md anew; one that was edited by hand is kept, with a message."""
    if not renew_card(Path(store), opened.card()) and not as_json:
        console.print(f"README.md of {escape(store)} was edited by hand and stays as it is; its members may be others.")


def _open_or_make(store: str, subspace: str | None) -> AdapterStore:
    if subspace is None and not Path(store).exists() and store.count("/") != 1:  # else it may be a Hub id
        raise EigenPeftError(
            f"There is no store {store!r} yet; --subspace FOLDER makes one, with the bases of that subspace."
        )
    if subspace is None or Path(store).exists():
        opened = AdapterStore.from_pretrained(store)
        if subspace is not None and PrincipalSubspace.from_pretrained(subspace) != opened.subspace:
            raise EigenPeftError(f"--subspace {subspace!r} is not the subspace of the store {store!r}; leave it out.")
        return opened
    made = AdapterStore(PrincipalSubspace.from_pretrained(subspace))
    made.save_pretrained(store)
    return made


def _rebase_adapters(folders: list[str], target: PrincipalSubspace, *, trained_on: str | None) -> AdapterStore:
    """A store of EigenLoRA adapters, each moved from the bases that it was trained on."""
    members = {}
    for folder in folders:
        config = read_json(Path(folder) / CONFIG_NAME)
        place = trained_on or config.get("subspace")
        if config.get("peft_type") != "EIGENLORA" or not place:
            raise EigenPeftError(
                f"{folder!r} is of peft_type {config.get('peft_type')!r} and names the subspace {place!r}; only EigenLoRA "
                "adapters are moved from one subspace to another. Add LoRA adapters with `eigenpeft store add`, and name the "
                "subspace of EigenLoRA adapters that name none with --from."
            )
        own = PrincipalSubspace.from_pretrained(
            place, revision=config.get("subspace_revision"), fingerprint=config.get("subspace_sha256")
        )
        one = AdapterStore(own)
        one.add(folder)
        (name,) = one.names
        members[name] = move_member(one[name], own, target)
    return AdapterStore(target, members=members)


def _adapters_in(source: str) -> list[str]:
    """The folders of adapters in a folder, if it is not one itself."""
    folder = Path(source)
    if not folder.is_dir() or _is_adapter(folder):
        return [source]
    return sorted(str(child) for child in folder.iterdir() if child.is_dir() and _is_adapter(child)) or [source]


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME))


def _done(summary: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print_json(summary)
    else:
        console.print(escape(text))
