"""What a change of a store asks first: may it be written, and is the name free."""

from collections.abc import Container
from typing import Any

from eigenpeft.artifacts.records.log import RecordLog
from eigenpeft.artifacts.records.source import MemoryRecords
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace.stores.format_1 import Format1Records

BASE = "__base__"
"""Name that no member can have: in a batch it stands for the base model itself, as in PEFT's `adapter_names`."""


def writable(records: Any, *, origin: str | None, revision: str | None) -> RecordLog | MemoryRecords:
    """The records of a store, if members can be changed one by one.

    Args:
        records: Records of a store.
        origin: Where the store was opened.
        revision: Revision on the Hub, of a store that was read there.

    Raises:
        ArtifactError: If they are of format 1, or lie in the Hub's cache.
    """
    if isinstance(records, Format1Records):
        raise ArtifactError(
            f"The store at {origin!r} is of format 1, which cannot be changed member by member; call compact() "
            "once (`eigenpeft store compact`), which writes it in the present format."
        )
    if revision is not None:
        raise ArtifactError(
            f"The store {origin!r} is a copy in the Hub's cache, which others use too; save it to a folder of your "
            "own first, with save_pretrained()."
        )
    return records


def check_new_name(name: Any, taken: Container[str], *, replace: bool) -> None:
    """Refuse what cannot be the name of a new member.

    Args:
        name: As it was passed.
        taken: Names of the members.
        replace: Whether it may take the place of a member.

    Raises:
        SubspaceError: If it is not a printable name of 1 to 250 characters, or is taken.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 250 or name == BASE:
        raise SubspaceError(
            f"{name!r} cannot be the name of a member: use 1 to 250 printable characters, and not {BASE!r}."
        )
    if name in taken and not replace:
        raise SubspaceError(
            f"{name!r} is in the store already; pass another name=, replace=True, or remove that member first."
        )
