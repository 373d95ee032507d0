"""Write whole or not at all, and replace nothing that eigenpeft did not write: the one way to the disk."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from eigenpeft.artifacts.exchange import exchange
from eigenpeft.artifacts.locks import one_writer
from eigenpeft.artifacts.manifest import (
    MANIFEST,
    Manifest,
    file_sha256,
    files_of,
    hashes_of,
    not_ours,
    read_manifest,
    write_manifest,
)
from eigenpeft.artifacts.scratch import (
    discard,
    finish_interrupted,
    make_scratch,
    old_path,
    remove_scratch,
    sweep,
)
from eigenpeft.errors import ArtifactError

_SHOWN = 5  # names of foreign files in one message


@dataclass(frozen=True)
class Update:
    """A change of an artifact that is being prepared.

    Attributes:
        scratch: Folder to write new files and new versions of old ones into.
        removed: Names of files of the artifact that go when the change is done.
    """

    scratch: Path
    removed: list[str] = field(default_factory=list)


def check_output(path: str | Path, *, kind: str, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Refuse a folder that must not be written, before the work that would fill it.

    Args:
        path: Folder to write.
        kind: What it will hold, in the words of messages.
        overwrite: Whether an artifact of this kind that eigenpeft wrote may be replaced.
        inputs: Paths that are read; names that are not local paths (Hub ids) are passed over.

    Returns:
        The folder, links resolved.

    Raises:
        ArtifactError: If it is a file, the current folder or above it, lies inside an input, holds something that
            eigenpeft did not write, holds another kind of artifact, or one of this kind without `overwrite`.
    """
    target = _checked_target(path, inputs)
    _make_parent(target, path)
    with one_writer(target):
        finish_interrupted(target)
        sweep(target)
        if _is_taken(target, path, kind=kind) and not overwrite:
            raise ArtifactError(_exists(path, kind))
    return target


@contextmanager
def atomic_folder(
    path: str | Path,
    *,
    kind: str,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    carried: Collection[str] = (),
) -> Iterator[Path]:
    """Yield an empty scratch folder beside `path`; on success it becomes `path` in one step.

    A folder that is new, or empty, is renamed into place. One that holds an artifact of this kind is exchanged for the new
    one, so that a reader sees the old or the new one whole; writing what is there already changes nothing. The folder gets
    a hidden record of the files and their hashes (`.eigenpeft.json`), which later proves that eigenpeft wrote them.

    Args:
        path: The folder to make.
        kind: What it will hold, in the words of messages.
        overwrite: Whether to replace an artifact of this kind that eigenpeft wrote and nobody has changed since.
        inputs: Paths that are read; the folder must not be one of them or lie inside one.
        carried: Names of files whose present text the new versions keep; they may have been changed by others.

    Yields:
        The scratch folder to write into. It is removed when the block raises, on Ctrl-C too; what a killed process left is
        removed by the next one that writes to the same place.

    Raises:
        ArtifactError: If the place cannot be written (read-only, full, a file in the way, another process writing there),
            or holds something that must not be replaced; see `check_output`.
    """
    target = _checked_target(path, inputs)
    _make_parent(target, path)
    with one_writer(target):
        finish_interrupted(target)
        sweep(target)
        is_taken = _is_taken(target, path, kind=kind, carried=carried)
        with _scratch(target, path) as scratch:
            yield scratch
            manifest = _finish(scratch, kind)
            if is_taken:
                there = read_manifest(target)
                if there is not None and there.files == manifest.files and not not_ours(target):
                    return
                if not overwrite:
                    raise ArtifactError(_exists(path, kind))
            else:
                _is_taken(target, path, kind=kind)  # something may have come meanwhile
            _switch(scratch, target)


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Yield the path of a scratch file; on success it is renamed to `path`.

    Args:
        path: The file to write.
        overwrite: Whether a file of that name may be replaced.
        inputs: Paths that are read; the file must not be one of them or lie inside one.

    Yields:
        A path in a scratch folder beside `path`, with the same file name; nothing is there yet.

    Raises:
        ArtifactError: If a file is there and `overwrite` is False, or the place cannot be written.
    """
    target = _checked_target(path, inputs, is_file=True)
    check_file(path, overwrite=overwrite)
    _make_parent(target, path)
    with one_writer(target):
        sweep(target)
        with _scratch(target, path) as scratch:
            yield scratch / target.name
            _settle_files(scratch, [scratch / target.name])
            check_file(path, overwrite=overwrite)  # again: it may have come meanwhile
            if target.exists():
                (scratch / target.name).chmod(target.stat().st_mode)
            (scratch / target.name).replace(target)
            _fsync(target.parent)


def check_file(path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a file that must not be written, before the work for it.

    Args:
        path: The file to write.
        overwrite: Whether a file of that name may be replaced.
        inputs: Paths that are read; the file must not be one of them or lie inside one.

    Raises:
        ArtifactError: If something is there that must not be replaced.
    """
    target = _checked_target(path, inputs, is_file=True)
    if target.is_dir():
        raise ArtifactError(f"Cannot write the file {str(path)!r}: a folder of that name is in the way.")
    if os.path.lexists(target) and (not overwrite or not target.is_file()):
        raise ArtifactError(
            f"{str(path)!r} already exists; pass overwrite=True (--overwrite on the command line) to replace it, or "
            "choose another name."
        )


@contextmanager
def atomic_update(folder: str | Path, *, last: str) -> Iterator[Update]:
    """Change files of an artifact: prepare them in a scratch folder, then give them their names, `last` after the others.

    Readers start from `last`: as long as the others have names that the old `last` does not use, a reader sees the old
    artifact or the new one. The lock is held by the caller (`one_writer`), who reads the present state under it.

    Args:
        folder: An artifact.
        last: Name of the file that names or describes the others.

    Yields:
        Where to write, and the list of files to remove.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    target = Path(os.path.realpath(folder))
    sweep(target)
    with _scratch(target, folder) as scratch:
        update = Update(scratch)
        yield update
        fresh = files_of(scratch)
        _settle_files(scratch, fresh.values())
        manifest = read_manifest(target)
        after: dict[str, tuple[str, ...]] = {}
        if manifest is not None:
            # Until all names are settled, each file may be the old or the new one.
            new = hashes_of(scratch)
            after = {name: hashes for name, hashes in {**manifest.files, **new}.items() if name not in update.removed}
            both = {
                name: tuple(dict.fromkeys((*manifest.files.get(name, ()), *new.get(name, ()))))
                for name in {**manifest.files, **new}
            }
            write_manifest(target, Manifest(manifest.kind, both))
        for name in sorted(fresh, key=lambda name: (name == last, name)):
            place = target / name
            if place.exists():
                fresh[name].chmod(place.stat().st_mode)
            fresh[name].replace(place)
        _fsync(target)
        for name in update.removed:
            if manifest is None or name in manifest.files:
                (target / name).unlink(missing_ok=True)
        if manifest is not None:
            write_manifest(target, Manifest(manifest.kind, after))


def _checked_target(path: str | Path, inputs: Iterable[str | Path], *, is_file: bool = False) -> Path:
    target = Path(os.path.realpath(path))
    what = "file" if is_file else "folder"
    here = Path(os.path.realpath(Path.cwd()))
    if not str(path) or target == here or target in here.parents:
        raise ArtifactError(
            f"Cannot write the {what} {str(path)!r}: it is the current folder or one above it. Name a new {what}, such as "
            f"'my-{what}'."
        )
    for source in inputs:
        place = Path(os.path.realpath(source))
        if not place.exists():
            continue  # a Hub id
        if target == place or place in target.parents or (target in place.parents and not is_file):
            raise ArtifactError(
                f"Cannot write to {str(path)!r}: it is, holds or lies inside {str(source)!r}, which is read. Choose a place "
                "outside it."
            )
    if not is_file and target.exists() and not target.is_dir():
        raise ArtifactError(
            f"Cannot write the folder {str(path)!r}: a file of that name is in the way. Remove it or choose another."
        )
    return target


def _is_taken(target: Path, path: str | Path, *, kind: str, carried: Collection[str] = ()) -> bool:
    """Whether the folder holds an artifact of this kind, wholly ours; refuses what must never be replaced."""
    try:
        if not target.exists() or not any(target.iterdir()):
            return False
        foreign = not_ours(target, carried=carried)
        manifest = read_manifest(target)
    except OSError as error:
        raise ArtifactError(f"Cannot read {str(path)!r}: {error.strerror or error}. Choose another folder.") from error
    if manifest is None or foreign:
        names = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
        raise ArtifactError(
            f"{str(path)!r} holds files that eigenpeft did not write: {names or 'an unfinished record'}. They are never "
            "replaced; choose another folder, or move or delete them yourself."
        )
    if manifest.kind != kind:
        raise ArtifactError(
            f"{str(path)!r} holds a {manifest.kind}; a {kind} never replaces it. Choose another folder, or delete that one "
            "yourself."
        )
    return True


def _exists(path: str | Path, kind: str) -> str:
    return (
        f"{str(path)!r} already holds a {kind}; pass overwrite=True (--overwrite on the command line) to replace it, or "
        "choose another folder."
    )


def _make_parent(target: Path, path: str | Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write to {str(Path(path).parent)!r}: {error.strerror or error}. Choose a folder you may write to."
        ) from error


@contextmanager
def _scratch(target: Path, path: str | Path) -> Iterator[Path]:
    """A scratch folder that is gone afterwards; every way in which writing fails becomes one ArtifactError."""
    try:
        scratch = make_scratch(target)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write to {str(Path(path).parent)!r}: {error.strerror or error}. Choose a folder you may write to."
        ) from error
    try:
        yield scratch
    except ArtifactError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own class, without an errno
        raise ArtifactError(
            f"Could not write {str(path)!r}: {getattr(error, 'strerror', None) or error}. What was there is unchanged; "
            "free some space or choose another place."
        ) from error
    finally:
        remove_scratch(scratch)


def _finish(scratch: Path, kind: str) -> Manifest:
    """Give a scratch folder its record and its permissions, and see it onto the disk."""
    files = {name: file for name, file in files_of(scratch).items() if not file.is_dir()}
    _settle_files(scratch, files.values())
    manifest = Manifest(kind, {name: (file_sha256(file),) for name, file in files.items()})
    write_manifest(scratch, manifest)
    _fsync(scratch / MANIFEST)
    return manifest


def _settle_files(scratch: Path, files: Iterable[Path]) -> None:
    # The manifest was made by a plain open: it has the permissions that the umask and the folder ask for. Some libraries
    # make files that only their owner can read.
    mode = (scratch / MANIFEST).stat().st_mode & 0o777
    for file in files:
        if file.is_file():
            file.chmod(mode)
            _fsync(file)


def _switch(scratch: Path, target: Path) -> None:
    """Put the finished scratch folder in the place of `target`, which is absent, empty, or an artifact of ours."""
    if not target.exists() or not any(target.iterdir()):
        with suppress(OSError):
            target.rmdir()
        scratch.rename(target)
        _fsync(target.parent)
        return
    scratch.chmod(target.stat().st_mode & 0o7777)
    if exchange(scratch, target):
        old = scratch
    else:
        old = old_path(scratch)
        target.rename(old)
        try:
            scratch.rename(target)
        except FileNotFoundError:
            if not target.exists():  # else a reader has finished the switch
                raise
    _fsync(target.parent)
    for file in discard(old):  # came while the new folder was being written
        place = target / file.relative_to(old)
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    discard(old)


def _fsync(path: Path) -> None:
    """Ask the system to keep a file or folder through a power cut; not every system can do that for folders."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
