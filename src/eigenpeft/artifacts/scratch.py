"""Scratch folders beside what is being written: made, recognized as our own, removed."""

import logging
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from eigenpeft.artifacts.manifest import (
    MANIFEST,
    UNFINISHED_MANIFEST,
    Manifest,
    file_sha256,
    files_of,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger(__name__)


def make_scratch(target: Path) -> Path:
    """Make an empty scratch folder beside `target`, with the permissions any other new folder would have.

    Args:
        target: What will be written; the parent folder must exist.

    Returns:
        The folder `.NAME.XXXXXXXX.tmp`; it holds a manifest that says it is unfinished.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    scratch.mkdir()
    write_manifest(scratch, Manifest(kind="scratch", files={}, whole=False))
    return scratch


def old_path(scratch: Path) -> Path:
    """Where the old folder waits while a system without exchange puts the new one in its place.

    Args:
        scratch: The new folder's scratch.
    """
    return scratch.with_suffix(".old")


def finish_interrupted(target: Path) -> None:
    """Do the second half of a switch in two steps that was interrupted between them, if there was one.

    Args:
        target: The folder that was being replaced. Whoever calls holds its lock, or only reads.
    """
    if target.exists():
        return
    for old in _leftovers(target, "old"):
        scratch = old.with_suffix(".tmp")
        for folder in (scratch, old):
            manifest = read_manifest(folder)
            if manifest is not None and manifest.whole:
                with suppress(OSError):
                    folder.rename(target)
                    return


def sweep(target: Path) -> None:
    """Remove the scratch folders that dead processes left beside `target`.

    Whoever calls holds the lock of `target`, so that nobody alive is using one. A folder is removed when its name and its
    manifest say that eigenpeft made it; of a folder that was finished, only the files whose hashes the manifest has.

    Args:
        target: What was being written.
    """
    for folder in (*_leftovers(target, "tmp"), *_leftovers(target, "old")):
        remove_scratch(folder, verify=True)


def remove_scratch(folder: Path, *, verify: bool = False) -> None:
    """Remove a scratch folder: all of it while it is unfinished, else what its manifest proves.

    Args:
        folder: The folder, which may be gone.
        verify: Whether to compare the hashes of a finished one.
    """
    if not folder.is_dir():
        return
    manifest = read_manifest(folder)
    if manifest is None:
        with suppress(OSError):
            (folder / UNFINISHED_MANIFEST).unlink(missing_ok=True)
            folder.rmdir()  # died before it wrote anything; a folder with contents is not ours and stays
    elif manifest.whole:
        discard(folder, verify=verify)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def discard(folder: Path, *, verify: bool = False) -> list[Path]:
    """Delete the files that the manifest names, and the folder too if nothing else is in it.

    Args:
        folder: A finished scratch folder, or an artifact that was replaced.
        verify: Whether to compare hashes, too, and not only names; not needed right after `not_ours` found nothing.

    Returns:
        Files that somebody else put there; they stay, and so does the folder then.
    """
    if not folder.is_dir():
        return []
    manifest = read_manifest(folder)
    known = manifest.files if manifest is not None else {}
    kept = []
    for name, path in files_of(folder).items():
        if path.is_dir() and not path.is_symlink():
            continue  # it is empty
        is_ours = name in known and path.is_file() and not path.is_symlink()
        if is_ours and (not verify or file_sha256(path) in known[name]):
            with suppress(OSError):  # Windows keeps a file that is open somewhere; the next run removes it
                path.unlink()
        else:
            kept.append(path)
    if kept:
        logger.warning("Left in %s, since eigenpeft did not write it: %s", folder, ", ".join(p.name for p in kept))
        return kept
    for place, _, _ in os.walk(folder, topdown=False):
        if not any(entry.name not in (MANIFEST, UNFINISHED_MANIFEST) for entry in os.scandir(place)):
            with suppress(OSError):
                for name in (MANIFEST, UNFINISHED_MANIFEST):
                    (Path(place) / name).unlink(missing_ok=True)
                Path(place).rmdir()
    return []


def _leftovers(target: Path, ending: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{ending}")
    try:
        entries = list(os.scandir(target.parent))
    except OSError:
        return []
    return [
        Path(entry.path) for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]
