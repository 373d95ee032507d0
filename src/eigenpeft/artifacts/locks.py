"""One writer at a time: a lock beside what is being written, which ends with its process."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import realpath
from pathlib import Path

from filelock import FileLock, Timeout

from eigenpeft.errors import ArtifactError


def lock_path(path: str | Path) -> Path:
    """Where the lock of a file or folder lies: beside it (links resolved), hidden.

    Args:
        path: What is written.
    """
    path = Path(realpath(path))
    return path.with_name(f".{path.name}.lock")


@contextmanager
def one_writer(path: str | Path, *, timeout: float = 120.0) -> Iterator[None]:
    """Hold the lock of a file or folder: no other process that asks for it writes there meanwhile.

    The operating system frees the lock of a process that dies. Not reentrant.

    Args:
        path: What is written; its parent folder must exist.
        timeout: Seconds to wait for another writer.

    Raises:
        ArtifactError: If another process still writes there after `timeout` seconds, or the lock cannot be made.
    """
    place = lock_path(path)
    lock = FileLock(place, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise ArtifactError(
            f"Another process is writing {str(path)!r} (it holds {place.name!r}, waited {timeout:g} s). Run the same "
            "command again when it has finished, or choose another place."
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"Cannot write to {str(place.parent)!r}: {error.strerror or error}. Choose a folder you may write to."
        ) from error
    try:
        yield
    finally:
        # Deleted while it is held; whoever waits for the deleted file notices and makes a new one.
        with suppress(OSError):
            place.unlink()
        lock.release()
