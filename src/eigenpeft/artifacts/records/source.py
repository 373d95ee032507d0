"""Named records: what can be asked of them wherever they lie, and records in memory."""

from collections.abc import Mapping
from typing import Protocol


class RecordSource(Protocol):
    """Records by name, wherever they lie."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, name: str) -> bytes:
        """The bytes of one record.

        Args:
            name: Name of the record.

        Raises:
            ArtifactError: If it cannot be read.
            KeyError: If there is no such record.
        """
        ...

    def size(self, name: str) -> int:
        """How many bytes a record has.

        Args:
            name: Name of the record.

        Raises:
            KeyError: If there is no such record.
        """
        ...


class MemoryRecords:
    """Records in memory; see `RecordSource`.

    Args:
        data: Bytes by name; None for none.
    """

    def __init__(self, data: Mapping[str, bytes] | None = None):
        self._data: dict[str, bytes] = dict(data or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        return tuple(self._data)

    def __contains__(self, name: object) -> bool:
        return name in self._data

    def __len__(self) -> int:
        return len(self._data)

    def read(self, name: str) -> bytes:
        """The bytes of one record.

        Args:
            name: Its name.
        """
        return self._data[name]

    def size(self, name: str) -> int:
        """How many bytes a record has.

        Args:
            name: Its name.
        """
        return len(self._data[name])

    def append(self, name: str, data: bytes) -> None:
        """Add or replace a record.

        Args:
            name: Its name.
            data: Its bytes.
        """
        self._data[name] = data

    def remove(self, name: str) -> None:
        """Remove a record.

        Args:
            name: Its name.
        """
        del self._data[name]

    def rename(self, name: str, new_name: str) -> None:
        """Give a record another name, at the same place of the order.

        Args:
            name: Its name.
            new_name: A name that no record has.
        """
        self._data = {new_name if key == name else key: data for key, data in self._data.items()}
