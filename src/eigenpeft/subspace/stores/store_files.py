"""The folder of an adapter store: made whole or not at all, opened, and brought up from format 1."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.atomic import atomic_folder, atomic_update, check_output
from eigenpeft.artifacts.locks import lock_path, one_writer
from eigenpeft.artifacts.manifest import Manifest, file_sha256, read_manifest, write_manifest
from eigenpeft.artifacts.records.log import SHARDS, RecordLog
from eigenpeft.artifacts.records.source import RecordSource
from eigenpeft.errors import ArtifactError
from eigenpeft.subspace.card import store_card
from eigenpeft.subspace.principal import PrincipalSubspace, read_subspace
from eigenpeft.subspace.stores.format_1 import Format1Records
from eigenpeft.subspace.stores.member import record_in

_CARD = "README.md"
_SHOWN_ON_CARD = 1000  # members whose records the card's license is taken from


def check_store_output(folder: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """`check_output` for a store, where members that were added since it was written are eigenpeft's own too.

    Args:
        folder: Folder to write.
        overwrite: Whether a store that eigenpeft wrote may be replaced.
        inputs: What is read.

    Raises:
        ArtifactError: If the folder must not be written.
    """
    folder, kind = Path(folder), storage.STORE
    if (folder / kind.config_name).is_file():
        _check_taken(folder, overwrite=overwrite)
        with one_writer(folder / kind.tensors_name):
            _claim(folder, lock_path(folder / kind.tensors_name).name)
    check_output(folder, kind=kind.label, overwrite=overwrite, inputs=inputs)


def write_store(
    folder: Path,
    subspace: PrincipalSubspace,
    records: Iterable[tuple[str, bytes]],
    *,
    card: str,
    overwrite: bool = False,
) -> None:
    """Make a folder with bases, members and card.

    Args:
        folder: Folder to make, or to replace.
        subspace: The bases.
        records: Members as name and bytes.
        card: Text of README.md.
        overwrite: Whether to replace a store that eigenpeft wrote.

    Raises:
        ArtifactError: If it cannot be written, or holds something that is not replaced.
    """
    kind = storage.STORE
    is_taken = (folder / kind.config_name).is_file()
    if is_taken:
        _check_taken(folder, overwrite=overwrite)
    # Nobody adds a member to the store that is replaced meanwhile.
    with one_writer(folder / kind.tensors_name) if is_taken else nullcontext():
        _write_whole(folder, subspace, records, card=card, overwrite=overwrite)


def replace_bases(
    records: RecordLog, subspace: PrincipalSubspace, members: Mapping[str, bytes], *, card: str
) -> RecordLog:
    """Write a store anew with other bases and members, at its place, whole or not at all.

    A reader sees the old store or the new one; a process that is stopped leaves one of them.

    Args:
        records: The members that there are; the caller holds `records.writing()`.
        subspace: The new bases.
        members: All members in them, bytes by name.
        card: Text of README.md.

    Raises:
        ArtifactError: If the folder cannot be written, or holds files that eigenpeft did not write.
    """
    _write_whole(records.folder, subspace, members.items(), card=card, overwrite=True)
    return RecordLog(records.folder)


def has_bases(folder: Path, subspace: PrincipalSubspace) -> bool:
    """Whether the config of a store names the fingerprint of these bases.

    Args:
        folder: Its folder.
        subspace: The bases.

    Raises:
        ArtifactError: If the config cannot be read.
    """
    return _named_bases(folder) == subspace.fingerprint


def check_bases(folder: Path, subspace: PrincipalSubspace) -> None:
    """Refuse a store whose bases are not those that were read.

    Args:
        folder: Its folder.
        subspace: The bases that were read.

    Raises:
        ArtifactError: If its config names another fingerprint.
    """
    if not has_bases(folder, subspace):
        raise ArtifactError(
            f"The store at {str(folder)!r} has bases of fingerprint {_named_bases(folder)} now, and "
            f"{subspace.fingerprint} when it was opened: another process gave it other bases. Call refresh(), or open it "
            "again."
        )


def open_store(where: storage.Location) -> tuple[PrincipalSubspace, RecordSource]:
    """The bases and the members of a located store, of any format.

    Args:
        where: Its place.

    Raises:
        ArtifactError: If files are missing, truncated or altered.
        SubspaceError: If the tensors of a bank do not fit each other.
    """
    config = storage.read_config(where)
    if where.kind is storage.STORE_1:
        subspace = read_subspace(where)
        return subspace, Format1Records(where, config, subspace)
    subspace = read_subspace(replace(where, kind=storage.SUBSPACE))
    if config.get("subspace_sha256") != subspace.fingerprint:
        raise ArtifactError(
            f"The bases of the adapter store at {where.origin!r} have fingerprint {subspace.fingerprint}, its "
            f"{where.kind.config_name} says {config.get('subspace_sha256')}: a file was altered. Get a fresh copy."
        )
    return subspace, RecordLog(where.folder)


def upgrade(folder: Path, subspace: PrincipalSubspace, records: Iterable[tuple[str, bytes]], *, card: str) -> RecordLog:
    """Write a store of format 1 in the present format at the same place.

    The config comes last and decides which format is read, so that a process that is stopped leaves one or the other.

    Args:
        folder: Its folder.
        subspace: Its bases.
        records: Its members as name and bytes.
        card: Text of README.md.

    Raises:
        ArtifactError: If the folder cannot be written, or another process is writing it.
    """
    kind = storage.STORE
    with one_writer(folder / kind.tensors_name), one_writer(folder):
        (folder / SHARDS).mkdir(exist_ok=True)
        with atomic_update(folder, last=kind.config_name) as update:
            _write_all(update.scratch, subspace, records, card=card)
            update.removed.append(storage.STORE_1.tensors_name)
    return RecordLog(folder)


def card_of(subspace: PrincipalSubspace, names: Sequence[str], read: Callable[[str], bytes]) -> str:
    """Text of the model card of a store; of a large one the first members alone are read.

    Args:
        subspace: Its bases.
        names: Its members' names.
        read: Gives a member's bytes by its name.

    Raises:
        ArtifactError: If a member's record cannot be read.
    """
    shown = [record_in(read(name), name=name) for name in names[:_SHOWN_ON_CARD]]
    return store_card(
        subspace.info, subspace.rows(), fingerprint=subspace.fingerprint, n_members=len(names), members=shown
    )


def write_card(folder: Path, card: str) -> None:
    """Write the model card of a store anew.

    Args:
        folder: Its folder.
        card: Text of README.md.

    Raises:
        ArtifactError: If it cannot be written.
    """
    with one_writer(folder), atomic_update(folder, last=_CARD) as update:
        (update.scratch / _CARD).write_text(card, encoding="utf-8")


def renew_card(folder: Path, card: str) -> bool:
    """Write the model card anew after members came or went, unless somebody has edited it; returns whether it says `card` now.

    Args:
        folder: Folder of the store.
        card: Text of README.md.

    Raises:
        ArtifactError: If it cannot be written.
    """
    manifest, there = read_manifest(folder), folder / _CARD
    ours = () if manifest is None else manifest.files.get(_CARD, ())
    if there.exists() and file_sha256(there) not in ours:
        return False
    write_card(folder, card)
    return True


def _write_whole(
    folder: Path, subspace: PrincipalSubspace, records: Iterable[tuple[str, bytes]], *, card: str, overwrite: bool
) -> None:
    """Write a store where there is none, or in the place of one whose lock the caller holds."""
    lock = lock_path(folder / storage.STORE.tensors_name)
    _claim(folder, lock.name)
    with atomic_folder(folder, kind=storage.STORE.label, overwrite=overwrite) as scratch:
        _write_all(scratch, subspace, records, card=card)
        # The lock goes with the folder: whoever waits for it, or asks for it in the new folder, must find the one that is
        # held.
        with suppress(OSError):
            os.link(lock, scratch / lock.name)


def _check_taken(folder: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise ArtifactError(
            f"{str(folder)!r} already holds another store; choose a new folder, open that store and add to it "
            "(AdapterStore.from_pretrained(...).add(...)), or pass overwrite=True to replace it."
        )


def _claim(folder: Path, lock: str) -> None:
    """Enter the members that were added since, if all are whole, and the lock into the record of what eigenpeft wrote."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    names = (lock,)
    with suppress(ArtifactError):
        log = RecordLog(folder)
        for name in log.names:
            log.read(name)
        names = (lock, *log.files(), *log.left_over())
    files = {name: hashes for name, hashes in manifest.files.items() if (folder / name).is_file()}
    files |= {name: (file_sha256(folder / name),) for name in names if (folder / name).is_file()}
    write_manifest(folder, Manifest(manifest.kind, files))


def _named_bases(folder: Path) -> Any:
    return storage.read_config(storage.Location(folder, storage.STORE, str(folder))).get("subspace_sha256")


def _write_all(folder: Path, subspace: PrincipalSubspace, records: Iterable[tuple[str, bytes]], *, card: str) -> None:
    _write_bases(folder, subspace)
    RecordLog.create(folder, records)
    (folder / _CARD).write_text(card, encoding="utf-8")
    (folder / storage.STORE.config_name).write_text(_config(subspace), encoding="utf-8")


def _write_bases(folder: Path, subspace: PrincipalSubspace) -> None:
    storage.write_files(folder, storage.SUBSPACE, config=subspace.config(), tensors=subspace.tensors())


def _config(subspace: PrincipalSubspace) -> str:
    kind = storage.STORE
    config: dict[str, Any] = {"format_version": kind.format_version, "subspace_sha256": subspace.fingerprint}
    return json.dumps(config, indent=2) + "\n"
