"""Files that others wrote, opened without trust: regular files only, at most so many bytes, JSON that is text."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Configs of ten thousand modules or members take a few MB; JSON takes several times its size in memory.
MAX_JSON_BYTES = 32 * 2**20
CHANGED = "it was replaced or changed since its header was read"


class Stamp(NamedTuple):
    """What tells one state of a file from another: replaced by rename, written over, cut or extended.

    Attributes:
        device: Device number of the file system.
        inode: Inode number of the file; another one after a rename over it.
        size: Bytes.
        modified: Time of the last change, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified: int


def open_regular(path: str | Path) -> int:
    """A file descriptor for reading a regular file; pipes, devices, sockets and folders are refused, not waited for.

    Args:
        path: The file; links are followed, as the Hub's cache is made of them.

    Raises:
        OSError: If it is not a regular file, or cannot be opened.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):  # before opening: a tape or a pipe notices being opened
        raise OSError("it is not a regular file but a folder, a pipe or a device")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced in between
        os.close(descriptor)
        raise OSError("it is not a regular file but a folder, a pipe or a device")
    return descriptor


def stamp(descriptor: int) -> Stamp:
    """The state of an open file.

    Args:
        descriptor: As `open_regular` gave it.
    """
    status = os.fstat(descriptor)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_at(descriptor: int, start: int, size: int) -> bytearray:
    """Bytes from a place in a file, fewer where the file ends.

    Nothing is mapped, so that a file that is cut meanwhile cannot crash the reader.

    Args:
        descriptor: As `open_regular` gave it.
        start: Place of the first byte.
        size: How many.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size and (n_read := _read_into(descriptor, view[done : done + (1 << 30)], start + done)):
        done += n_read
    view.release()
    del data[done:]
    return data


def _read_into(descriptor: int, view: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):  # leaves the file's position alone, so that threads can read at once
        return os.preadv(descriptor, [view], start)
    os.lseek(descriptor, start, os.SEEK_SET)  # Windows
    part = os.read(descriptor, len(view))
    view[: len(part)] = part
    return len(part)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder of that name; a name that no file system takes names none.

    Args:
        path: Any text: longer than names may be, with NUL characters, or a Hub id.
    """
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """All of a regular file that has at most `limit` bytes.

    Args:
        path: The file.
        limit: Bytes.

    Raises:
        OSError: If it is not a regular file, or cannot be read.
        ValueError: If it is larger.
    """
    descriptor = open_regular(path)
    try:
        if stamp(descriptor).size <= limit:
            data = read_at(descriptor, 0, min(stamp(descriptor).size, limit) + 1)  # one more: it may be growing
            if len(data) <= limit:
                return bytes(data)
    finally:
        os.close(descriptor)
    raise ValueError(f"it has more than the {limit} bytes that are read of such a file")


def read_start(path: str | Path, *, limit: int) -> bytes:
    """The first bytes of a regular file.

    Args:
        path: The file.
        limit: How many at most.

    Raises:
        OSError: If it is not a regular file, or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        return bytes(read_at(descriptor, 0, limit))
    finally:
        os.close(descriptor)


def read_json(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """A JSON file that somebody else wrote.

    Args:
        path: The file.
        limit: Bytes that are read at most.

    Raises:
        OSError: If it is not a regular file, or cannot be read.
        ValueError: If it is too large, no JSON, nested too deep, or holds text that no file or terminal could take.
    """
    return parse_json(read_bytes(path, limit=limit))


def parse_json(data: bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON from bytes; every fault of the text is a ValueError.

    Args:
        data: UTF-8.
        pairs: As `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: If it is not JSON, nested too deep, or holds half a surrogate pair.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if b"\\u" in data:  # "\ud800" alone is legal JSON but no text: writing it anywhere would fail
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return value
