"""Plain LoRA folders that engines read, within a bound of bytes: each written whole, the least recently used removed."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from eigenpeft.errors import EigenPeftError

_KEY = re.compile(r"[0-9a-f]{40}(-r\d+)?")
_LOCK, _COMING, _GOING = ".lock", ".coming.", ".going."


class LoraCache:
    """Folders by key in one folder, never more bytes than allowed, shared by all processes that name the same folder.

    A file lock covers every change, so that several servers and their workers may use one cache. Whatever a process that
    was killed left half-written is removed by the next one.

    Args:
        cache_dir: Folder to make or to share. Only folders that are named by a key are counted and removed.
        max_bytes: Bound of the sum of all files' sizes.
        timeout: Seconds to wait for another process.

    Raises:
        EigenPeftError: If the bound is not positive.

    Examples:
        >>> cache = LoraCache("cache", max_bytes=1000)
        >>> cache.n_bytes
        0
    """

    def __init__(self, cache_dir: str | Path, *, max_bytes: int, timeout: float = 120.0):
        if max_bytes < 1:
            raise EigenPeftError(f"max_bytes={max_bytes} must be a positive number of bytes.")
        self.cache_dir, self.max_bytes = Path(cache_dir), max_bytes
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.cache_dir / _LOCK, timeout=timeout)

    def path(self, key: str) -> Path:
        """Where the adapter of a key lies, if it is there.

        Args:
            key: 40 hexadecimal digits, then perhaps `-r` and a rank.
        """
        return self.cache_dir / key

    @property
    def n_bytes(self) -> int:
        """Bytes of all adapters that are there."""
        return sum(_size(path) for path in self._adapters())

    def touch(self, key: str) -> bool:
        """Note that an adapter was used; returns whether it is there.

        Args:
            key: Its key.
        """
        try:
            os.utime(self.path(key))
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nothing is added or removed by other processes or threads in the block."""
        with self._lock:
            yield

    def add(self, key: str, *, n_bytes: int, write: Callable[[Path], None]) -> Path:
        """The folder of an adapter, written if it is not there.

        Args:
            key: Its key.
            n_bytes: At least the bytes that `write` will write.
            write: Fills an empty folder, which then gets its name in one step.

        Raises:
            EigenPeftError: If the adapter alone is larger than the bound.
        """
        with self._lock:
            if not self.touch(key):
                self._make_room(n_bytes)
                scratch = self.cache_dir / f"{_COMING}{key}"
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                try:
                    write(scratch)
                    scratch.rename(self.path(key))
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
            return self.path(key)

    def _make_room(self, n_bytes: int) -> None:
        if n_bytes > self.max_bytes:
            raise EigenPeftError(
                f"An adapter of {n_bytes:,} bytes does not fit into the cache of {self.max_bytes:,} bytes at "
                f"{str(self.cache_dir)!r}; allow more (EIGENPEFT_CACHE_GB)."
            )
        for left in self.cache_dir.iterdir():  # what a killed process left: nobody else writes while the lock is held
            if left.is_dir() and left.name.startswith((_COMING, _GOING)):
                shutil.rmtree(left, ignore_errors=True)
        sizes = {path: _size(path) for path in self._adapters()}
        total = sum(sizes.values())
        for path in sorted(sizes, key=lambda path: path.stat().st_mtime_ns):
            if total + n_bytes <= self.max_bytes:
                return
            going = self.cache_dir / f"{_GOING}{path.name}"
            path.rename(going)  # in one step: nobody finds half an adapter
            shutil.rmtree(going, ignore_errors=True)
            total -= sizes[path]

    def _adapters(self) -> list[Path]:
        return [path for path in self.cache_dir.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:  # removed meanwhile by another process
        return 0
