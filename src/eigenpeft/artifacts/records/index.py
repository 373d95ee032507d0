"""The index of a record log: one line per change, each with a hash over all lines before it."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eigenpeft.errors import ArtifactError

INDEX_NAME = "members.index"
_FORMAT = 1
_SHARD = re.compile(r"[0-9a-f]{16}")
_CHECK_DIGITS = 16


@dataclass(frozen=True)
class Place:
    """Where one record lies.

    Attributes:
        shard: Stem of its shard file.
        start: First byte in that file.
        size: Bytes.
        sha256: SHA-256 of the bytes.
    """

    shard: str
    start: int
    size: int
    sha256: str


@dataclass
class IndexState:
    """What an index says up to some byte.

    Attributes:
        places: Records by name, in the order in which they were added.
        size: Bytes of the file that were read: the end of the last whole line.
        check: Hash of the last whole line, which the next one continues.
        head: First line of the file; another one means that the file was written anew.
        shards: Stems of all shard files that a line names, also of records that have gone since.
    """

    places: dict[str, Place] = field(default_factory=dict)
    size: int = 0
    check: str = ""
    head: bytes = b""
    shards: set[str] = field(default_factory=set)

    def copy(self) -> "IndexState":
        """One that changes apart from this one."""
        return replace(self, places=dict(self.places), shards=set(self.shards))


def new_index(token: str) -> tuple[bytes, IndexState]:
    """The first line of an index, and the state after it.

    Args:
        token: Random text that tells this index from later ones at the same place.
    """
    return lines_of([{"format": _FORMAT, "token": token}], IndexState())


def lines_of(changes: list[dict[str, Any]], state: IndexState) -> tuple[bytes, IndexState]:
    """Changes as lines to append, and the state after them.

    Args:
        changes: `{"add": name, "shard": ..., "start": ..., "size": ..., "sha256": ...}`, `{"remove": name}` or
            `{"rename": name, "to": name}`.
        state: Before them; not changed.

    Raises:
        ValueError, KeyError: If a change is none, or of a record that there is not.
    """
    text = b""
    after = state.copy()
    lines = []
    for change in changes:
        body = json.dumps(change, ensure_ascii=False, separators=(",", ":")).encode()
        after.check = _check(after.check, body)
        lines.append(after.check.encode() + b" " + body + b"\n")
        if not after.head:
            after.head = lines[0]
        else:
            _apply(change, after)
    text = b"".join(lines)
    after.size += len(text)
    return text, after


def read_index(path: Path, *, known: IndexState | None = None) -> IndexState:
    """Read an index, or what was appended to it since.

    What follows the last line break is the line of a writer that was stopped, or that is still writing: it does not count.

    Args:
        path: The file.
        known: What was read before; only later lines are read if the file still begins with the same line.

    Raises:
        ArtifactError: If the file is missing or was altered.
    """
    try:
        with path.open("rb") as file:
            state = IndexState()
            if known is not None and file.readline() == known.head:
                file.seek(known.size)
                state = known.copy()
            else:
                file.seek(0)
            data = file.read()
    except OSError as error:
        raise ArtifactError(
            f"{str(path)!r} cannot be read ({error.strerror or error}); get a fresh copy of the store."
        ) from error
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.splitlines(keepends=True):
        check, _, body = line.rstrip(b"\n").partition(b" ")
        expected = _check(state.check, body)
        if check.decode("ascii", "replace") != expected:
            raise _altered(path, state, "its hash does not fit the lines before it")
        try:
            change = json.loads(body.decode())  # of bytes, json would look for the encoding of every line
            if not state.head:
                _check_head(change)
                state.head = line
            else:
                _apply(change, state)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _altered(path, state, f"{type(error).__name__}: {error}") from error
        state.check, state.size = expected, state.size + len(line)
    if not state.head:
        raise ArtifactError(f"{str(path)!r} is empty: it lacks its first line. Get a fresh copy of the store.")
    return state


def _check_head(change: Any) -> None:
    version = change.get("format") if isinstance(change, dict) else None
    if version != _FORMAT:
        raise ValueError(f"format {version!r}, and this version of eigenpeft reads {_FORMAT}; upgrade eigenpeft")


def _apply(change: dict[str, Any], state: IndexState) -> None:
    places = state.places
    if "add" in change:
        name, place = change["add"], Place(change["shard"], change["start"], change["size"], change["sha256"])
        numbers = place.start, place.size
        if not (isinstance(name, str) and isinstance(place.sha256, str) and _SHARD.fullmatch(place.shard)):
            raise ValueError("a record without a name, a shard or a hash")
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
            raise ValueError(f"a record at {numbers}")
        places[name] = place
        state.shards.add(place.shard)
    elif "remove" in change:
        del places[change["remove"]]
    elif "rename" in change:
        old, new = change["rename"], change["to"]
        if not isinstance(new, str) or new in places:
            raise ValueError(f"a second record named {new!r}")
        moved = {new if name == old else name: place for name, place in places.items()}
        if old not in places:
            raise KeyError(old)
        places.clear()
        places.update(moved)
    else:
        raise ValueError("a line that is not a change")


def _check(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:_CHECK_DIGITS]


def _altered(path: Path, state: IndexState, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{str(path)!r} was altered after its first {state.size} bytes, which hold {len(state.places)} members ({reason}). "
        "Get a fresh copy of the store."
    )
