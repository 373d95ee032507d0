"""Named records in a folder: appended one by one, each with a hash, joined on request, one writer at a time."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO

from eigenpeft.artifacts.locks import one_writer
from eigenpeft.artifacts.records.index import INDEX_NAME, Place, lines_of, new_index, read_index
from eigenpeft.errors import ArtifactError

SHARDS = "members"
"""Folder of the shard files."""
SUFFIX = ".shard"
_JOINED_SIZE = 256 << 20  # where records are written together, another shard begins from this size on
Records = Iterable[tuple[str, bytes]]


class RecordLog:
    """Records in a folder; see `RecordSource`.

    A record is written into a file of its own, then one line is appended to the index: a process that is stopped at any
    moment leaves all earlier records as they were, and at most a file that no line names. `compact` writes all records
    into few files and an index without history, which takes the old one's place in one step. Readers need no lock.

    Args:
        folder: Folder that has an index.

    Raises:
        ArtifactError: If the index is missing or was altered.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._guard = RLock()
        self._state = read_index(folder / INDEX_NAME)

    @classmethod
    def create(cls, folder: Path, records: Records = ()) -> "RecordLog":
        """Make a log in a folder that has none.

        Args:
            folder: An existing folder.
            records: What it holds from the start, as name and bytes.

        Raises:
            ArtifactError: If the index that was written cannot be read.
        """
        _write_joined(folder, records, ())
        return cls(folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        return tuple(self._state.places)

    def __contains__(self, name: object) -> bool:
        return name in self._state.places

    def __len__(self) -> int:
        return len(self._state.places)

    def size(self, name: str) -> int:
        """How many bytes a record has.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is no such record.
        """
        return self._state.places[name].size

    def files(self) -> tuple[str, ...]:
        """Paths of all files that records need, relative to the folder, the index last."""
        shards = dict.fromkeys(place.shard for place in self._state.places.values())
        return (*(f"{SHARDS}/{shard}{SUFFIX}" for shard in shards), INDEX_NAME)

    def left_over(self) -> tuple[str, ...]:
        """Paths of the files that lie there still and held records that have gone since: the next `compact` deletes them."""
        needed = {place.shard for place in self._state.places.values()}
        gone = (f"{SHARDS}/{shard}{SUFFIX}" for shard in sorted(self._state.shards - needed))
        return tuple(path for path in gone if (self.folder / path).is_file())

    def refresh(self) -> bool:
        """Read what other processes have written since; returns whether there was anything.

        Raises:
            ArtifactError: If the index is missing or was altered.
        """
        with self._guard:
            before = self._state
            self._state = read_index(self.folder / INDEX_NAME, known=before)
            return (self._state.check, self._state.head) != (before.check, before.head)

    def read(self, name: str) -> bytes:
        """The bytes of one record, held against their hash; nothing else is read.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is no such record.
            ArtifactError: If its file is gone, truncated or altered.
        """
        place = self._state.places[name]
        path = self._path(place.shard)
        try:
            data = _read_bytes(path, place)
        except FileNotFoundError:
            # Joined with others by another process since; the index says where it is now.
            self.refresh()
            if self._state.places.get(name, place) != place:
                return self.read(name)
            raise ArtifactError(
                f"{str(path)!r}, which holds {name!r}, is missing. Get a fresh copy of the store, or remove that member."
            ) from None
        except OSError as error:
            raise ArtifactError(
                f"{str(path)!r}, which holds {name!r}, cannot be read ({error.strerror or error})."
            ) from error
        if len(data) != place.size or hashlib.sha256(data).hexdigest() != place.sha256:
            raise ArtifactError(
                f"The {place.size} bytes of {name!r} in {str(path)!r} are not those that were written: the file was "
                "truncated or altered. Get a fresh copy of the store, or remove that member."
            )
        return data

    def append(self, name: str, data: bytes, *, replace: bool = False, check: Callable[[], None] | None = None) -> None:
        """Write a record; the others are not touched.

        Args:
            name: Its name.
            data: Its bytes.
            replace: Take the place of a record of that name.
            check: Called once nobody else can write; what it raises stops the writing.

        Raises:
            ArtifactError: If there is a record of that name, another process holds the lock, or the folder cannot be
                written.
        """
        with self.writing():
            if check is not None:
                check()
            if name in self._state.places and not replace:
                raise ArtifactError(
                    f"{name!r} is in {str(self.folder)!r} already; another process has just added it. "
                    "Take another name, or pass replace=True."
                )
            shard = _new_shard()
            path = self._path(shard)
            try:
                path.parent.mkdir(exist_ok=True)
                with path.open("xb") as file:
                    file.write(data)
                    _sync(file)
                _sync_folder(path.parent)
                self._append_lines([_added(name, shard, 0, data)])
            except BaseException:
                if name not in self._state.places or self._state.places[name].shard != shard:
                    path.unlink(missing_ok=True)
                raise

    def remove(self, name: str) -> None:
        """Remove a record; its bytes go with the next `compact`.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is none any more.
            ArtifactError: If another process holds the lock, or the folder cannot be written.
        """
        with self.writing():
            if name not in self._state.places:
                raise KeyError(self._gone(name))
            self._append_lines([{"remove": name}])

    def rename(self, name: str, new_name: str) -> None:
        """Give a record another name, at the same place of the order.

        Args:
            name: Its name.
            new_name: A name that no record has.

        Raises:
            KeyError: If there is no such record any more.
            ArtifactError: If the new name is taken, another process holds the lock, or the folder cannot be written.
        """
        with self.writing():
            if name not in self._state.places:
                raise KeyError(self._gone(name))
            if new_name in self._state.places:
                raise ArtifactError(f"{new_name!r} is in {str(self.folder)!r} already; choose another name.")
            self._append_lines([{"rename": name, "to": new_name}])

    def compact(self, *, progress: Callable[[Records], Records] = lambda records: records) -> int:
        """Write all records into few files and the index without its history; returns the bytes that became free.

        Args:
            progress: Wraps the iteration over the records, for a progress bar.

        Raises:
            ArtifactError: If a record was altered (nothing has changed then), another process holds the lock, or the folder
                cannot be written.
        """
        with self.writing():
            before = _bytes_of(self.folder)
            _write_joined(self.folder, progress((name, self.read(name)) for name in self.names), self._files_there())
            self._state = read_index(self.folder / INDEX_NAME)
            return before - _bytes_of(self.folder)

    def _gone(self, name: str) -> str:
        there = ", ".join(map(repr, self.names[:10])) or "no records"
        return (
            f"{name!r} is not in {str(self.folder)!r} any more: another process has removed or renamed it. Use a name that is "
            f"there: {there}{', ...' if len(self.names) > 10 else ''}."
        )

    def _path(self, shard: str) -> Path:
        return self.folder / SHARDS / f"{shard}{SUFFIX}"

    def _files_there(self) -> list[Path]:
        folder = self.folder / SHARDS
        return [path for path in folder.iterdir() if path.suffix == SUFFIX] if folder.is_dir() else []

    def _append_lines(self, changes: list[dict[str, Any]]) -> None:
        text, after = lines_of(changes, self._state)
        path = self.folder / INDEX_NAME
        with path.open("r+b") as file:
            # What another writer left of a line when it was stopped; without this the next line would join it.
            file.truncate(self._state.size)
            file.seek(self._state.size)
            try:
                file.write(text)
                _sync(file)
            except OSError:
                with suppress(OSError):
                    file.truncate(self._state.size)
                raise
        self._state = after

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other writers out for the length of a block, having read what they wrote before; not reentrant.

        Raises:
            ArtifactError: If another process holds the lock, or the block cannot write.
        """
        with self._guard, one_writer(self.folder / INDEX_NAME):
            self.refresh()
            try:
                yield
            except OSError as error:
                if isinstance(error, ArtifactError):
                    raise
                raise ArtifactError(
                    f"Could not write to {str(self.folder)!r}: {error.strerror or error}. What was there is unchanged; "
                    "free some space or choose a folder you may write to."
                ) from error


def _write_joined(folder: Path, records: Records, old_files: Iterable[Path]) -> None:
    """Write records into few shards, put an index of them in the old one's place, and then delete the old files."""
    (folder / SHARDS).mkdir(exist_ok=True)
    old_files = list(old_files)
    made: list[Path] = []
    index = folder / f".{INDEX_NAME}.{secrets.token_hex(4)}.tmp"
    try:
        changes = list(_write_shards(folder, records, made))
        head, state = new_index(secrets.token_hex(8))
        lines, _ = lines_of(changes, state)
        with index.open("xb") as file:
            file.write(head + lines)
            _sync(file)
        _sync_folder(folder / SHARDS)
        index.replace(folder / INDEX_NAME)
    except BaseException:
        for path in (*made, index):
            path.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    for path in old_files:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a log without records has no shards, and an empty folder would count as somebody else's
        (folder / SHARDS).rmdir()
    for path in folder.glob(f".{INDEX_NAME}.*.tmp"):  # a process that was stopped has left them
        path.unlink(missing_ok=True)


def _write_shards(folder: Path, records: Records, made: list[Path]) -> Iterator[dict[str, Any]]:
    file: BinaryIO | None = None
    shard, start = "", 0
    try:
        for name, data in records:
            if file is None or start + len(data) > _JOINED_SIZE:
                if file is not None:
                    _sync(file)
                    file.close()
                shard, start = _new_shard(), 0
                made.append(folder / SHARDS / f"{shard}{SUFFIX}")
                file = made[-1].open("xb")
            file.write(data)
            yield _added(name, shard, start, data)
            start += len(data)
        if file is not None:
            _sync(file)
    finally:
        if file is not None:
            file.close()


def _added(name: str, shard: str, start: int, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"add": name, "shard": shard, "start": start, "size": len(data), "sha256": sha256}


def _new_shard() -> str:
    # Random, so that a reader with an older index never finds other bytes under a name that it knows.
    return secrets.token_hex(8)


def _read_bytes(path: Path, place: Place) -> bytes:
    with path.open("rb") as file:
        if place.start + place.size > os.fstat(file.fileno()).st_size:  # before the memory for it is taken
            return b""
        file.seek(place.start)
        return file.read(place.size)


def _bytes_of(folder: Path) -> int:
    shards = folder / SHARDS
    files = [folder / INDEX_NAME, *(shards.iterdir() if shards.is_dir() else ())]
    return sum(path.stat().st_size for path in files if path.is_file())


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # So that a power failure cannot lose the name of a file whose bytes are safe; not every system has it.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
