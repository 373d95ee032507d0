"""The record of the files that eigenpeft wrote into a folder, by which it proves that they are its own."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

MANIFEST = ".eigenpeft.json"
"""Name of the record; it is hidden, is never sent to the Hub, and no reader needs it."""

UNFINISHED_MANIFEST = f"{MANIFEST}.new"
"""Where the record is written before it takes its name."""

_FORMAT_VERSION = 1
_LARGEST_MANIFEST = 64 * 2**20  # bytes; a record of another tool or a damaged one is not read


@dataclass(frozen=True)
class Manifest:
    """What a folder holds, as far as eigenpeft wrote it.

    Attributes:
        kind: What the folder is, in the words of messages: "subspace", "plain LoRA adapter".
        files: The SHA-256 values each file may have, by its path in the folder with forward slashes. There are two while
            a file is being exchanged, so that an interruption leaves no file without a proof.
        whole: Whether the folder was finished; False for a scratch folder that is being written.
    """

    kind: str
    files: Mapping[str, tuple[str, ...]]
    whole: bool = True


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Every file, link and empty folder below a folder by its path in it, the manifest left out.

    Links are listed and never followed.

    Args:
        folder: The folder.
    """
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        place = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            inside = files_of(place)
            if inside or (place / MANIFEST).exists():
                found.update({f"{entry.name}/{name}": file for name, file in inside.items()})
            else:
                found[entry.name] = place
        elif entry.name not in (MANIFEST, UNFINISHED_MANIFEST):
            found[entry.name] = place
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the record of a folder in one step.

    Args:
        folder: The folder.
        manifest: What it holds.
    """
    text = json.dumps(
        {
            "format_version": _FORMAT_VERSION,
            "kind": manifest.kind,
            "whole": manifest.whole,
            "sha256": {name: list(hashes) for name, hashes in sorted(manifest.files.items())},
        },
        indent=1,
    )
    scratch = folder / UNFINISHED_MANIFEST
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest | None:
    """The record of a folder; None where there is none or it cannot be read.

    The names in it come from a file: they are only compared with the names of files that are there, never opened.

    Args:
        folder: The folder.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != _FORMAT_VERSION:
            return None
        files = {str(name): tuple(str(value) for value in hashes) for name, hashes in data["sha256"].items()}
        return Manifest(kind=str(data["kind"]), files=files, whole=bool(data["whole"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def hashes_of(folder: Path) -> dict[str, tuple[str, ...]]:
    """The entry `files` of a manifest for what a folder holds now.

    Args:
        folder: The folder.
    """
    return {name: (file_sha256(path),) for name, path in files_of(folder).items()}


def not_ours(folder: Path, *, carried: Collection[str] = ()) -> list[str]:
    """What lies in a folder and was not written by eigenpeft, or was changed since; empty if there is nothing such.

    Args:
        folder: The folder.
        carried: Names of files in the record that may have been changed.

    Returns:
        Names as a message shows them, such as "notes.txt" and "README.md (changed since it was written)".
    """
    manifest = read_manifest(folder)
    known = manifest.files if manifest is not None and manifest.whole else {}
    found = []
    for name, path in files_of(folder).items():
        if name not in known or path.is_symlink() or not path.is_file():
            found.append(name)
        elif name not in carried and file_sha256(path) not in known[name]:
            found.append(f"{name} (changed since it was written)")
    return found
