"""Folders that appear whole or not at all: everything is written under a temporary name, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eigenpeft.errors import ArtifactError


@contextmanager
def atomic_folder(path: str | Path, *, last: str) -> Iterator[Path]:
    """Yield an empty scratch folder beside `path`; on success its files become the files of `path`.

    A new folder is renamed into place in one step. Into a folder that already exists each file is renamed over its
    namesake, `last` after all the others: readers check `last` against the rest, so that an interruption between two
    renames is detected on loading and is never read as a whole artifact.

    Args:
        path: The folder to make or to update.
        last: Name of the file that vouches for the others (the configuration with the hashes).

    Yields:
        The scratch folder to write into. It is removed when the block raises, on Ctrl-C too.

    Raises:
        ArtifactError: If the place cannot be written (read-only, full, a file in the way).
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ArtifactError(
            f"Cannot write the folder {str(path)!r}: a file of that name is in the way. Remove it or choose another."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ArtifactError(
            f"Cannot write to {str(path.parent)!r}: {error.strerror or error}. Choose a folder you may write to."
        ) from error
    try:
        yield scratch
        _publish(scratch, path, last=last)
    except OSError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"Could not write {str(path)!r}: {error.strerror or error}. What was there is unchanged; free some "
            "space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, path: Path, *, last: str) -> None:
    # mkdtemp makes private folders; an artifact has the permissions any other new folder would have.
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(0o777 & ~umask)
    if not path.exists():
        scratch.rename(path)
        return
    names = sorted(str(file.relative_to(scratch)) for file in scratch.rglob("*") if file.is_file())
    for name in [name for name in names if name != last] + [last]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(path / name)
