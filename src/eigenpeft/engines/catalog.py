"""Which member of which store a model's name means, while the stores change on disk."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from eigenpeft.errors import EigenPeftError, UnknownAdapterError
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners.files.export import Contents, read_adapter

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class StoredAdapter:
    """One member as it is now.

    Attributes:
        store: Label of its store.
        member: Its name there.
        key: Hash of the plain LoRA that the member is exported as; it changes when the member is replaced.
        rank: The largest rank of its updates.
        base_model: Name of the base model, as the store has it.
    """

    store: str
    member: str
    key: str
    rank: int
    base_model: str | None


class StoreCatalog:
    """Members of one or several stores by the names that requests use: `STORE/MEMBER`, or `MEMBER` where only one has it.

    A store is called by the name of its folder, or by its Hub id. Folders are looked at again at every question, so that
    members that were added or removed meanwhile are known or refused; a store on the Hub is read once. Safe to use from
    several threads.

    Args:
        places: Folders or Hub ids of stores.

    Raises:
        EigenPeftError: If no place is given or two stores have the same name.
        SubspaceNotFoundError: If there is no store at a place.
        ArtifactError: If a store is damaged.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> from eigenpeft.subspace import AdapterMember, AdapterStore, Core
        >>> core = Core("diagonal", {"coefficients_out": torch.ones(2)})
        >>> store = AdapterStore(PrincipalSubspace({"0": bank}), members={"mine": AdapterMember({"0": core})})
        >>> store.save_pretrained("customers")
        >>> catalog = StoreCatalog(["customers"])
        >>> catalog.names("customers"), catalog.find("mine").member, catalog.find("customers/mine").member
        (('mine',), 'mine', 'mine')
    """

    def __init__(self, places: Sequence[str | Path]):
        if not places:
            raise EigenPeftError("No store is named; give the folder or Hub id of a store.")
        self._lock = threading.RLock()
        self._stores: dict[str, _OpenStore] = {}
        for place in places:
            label = Path(place).resolve().name if Path(place).is_dir() else str(place)
            if label in self._stores:
                raise EigenPeftError(
                    f"Two stores are called {label!r}: {str(self._stores[label].place)!r} and {str(place)!r}. Requests name a "
                    "store by its folder's name; rename one of the folders."
                )
            self._stores[label] = _OpenStore(place)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the stores."""
        return tuple(self._stores)

    def names(self, label: str) -> tuple[str, ...]:
        """Members of one store, as they are now.

        Args:
            label: Name of the store.

        Raises:
            KeyError: If there is no such store.
        """
        with self._lock:
            return self._stores[label].current().names

    def find(self, model_name: str) -> StoredAdapter:
        """The member that a request means.

        Args:
            model_name: `STORE/MEMBER` or `MEMBER`.

        Raises:
            UnknownAdapterError: If no store has such a member, or several have; the message lists near or full names.
        """
        with self._lock:
            named = [
                (label, model_name[len(label) + 1 :]) for label in self._stores if model_name.startswith(f"{label}/")
            ]
            found = [(label, member) for label, member in named if member in self._stores[label].current()]
            found = found or [
                (label, model_name) for label, store in self._stores.items() if model_name in store.current()
            ]
            if len(found) > 1:
                full = ", ".join(repr(f"{label}/{member}") for label, member in found)
                raise UnknownAdapterError(f"{model_name!r} is in several stores; ask for one of {full}.")
            if not found:
                raise UnknownAdapterError(self._unknown(model_name))
            label, member = found[0]
            return self._stores[label].adapter(label, member)

    def contents(self, adapter: StoredAdapter) -> Contents:
        """What a plain LoRA of a member holds.

        Args:
            adapter: From `find`.

        Raises:
            UnknownAdapterError: If the member was replaced or removed since.
        """
        with self._lock:
            store = self._stores[adapter.store]
            if adapter.member not in store.current() or store.adapter(adapter.store, adapter.member) != adapter:
                raise UnknownAdapterError(
                    f"{adapter.member!r} was replaced or removed in its store meanwhile; ask again."
                )
            return store.contents(adapter.member)

    def _unknown(self, model_name: str) -> str:
        bare = {name: f"{label}/{name}" for label in self._stores for name in self.names(label)}
        wanted = model_name.rsplit("/", 1)[-1]
        near = dict.fromkeys(
            [*get_close_matches(model_name, bare, n=3), *get_close_matches(wanted, bare, n=3)]
        ) or dict.fromkeys(list(bare)[:3])
        total = sum(len(self.names(label)) for label in self._stores)
        shown = ", ".join(repr(name) for name in near) or "none"
        return f"No adapter {model_name!r} among the {total} of {', '.join(map(repr, self._stores))}; names near it: {shown}."


class _OpenStore:
    """A store, opened again when its files have changed, what its members are, and the contents of the one read last."""

    def __init__(self, place: str | Path):
        self.place = place
        self._signature = _signature(place)
        self._store = AdapterStore.from_pretrained(place)
        self._known: dict[str, StoredAdapter] = {}
        self._last: tuple[str, Contents] | None = None

    def current(self) -> AdapterStore:
        signature = _signature(self.place)
        if signature != self._signature:  # another store was written in its place
            self._store = AdapterStore.from_pretrained(self.place)
        elif not self._store.refresh():
            return self._store
        self._signature, self._known, self._last = signature, {}, None
        return self._store

    def adapter(self, label: str, member: str) -> StoredAdapter:
        self.current()
        if member not in self._known:
            contents = self.contents(member)
            rank = max((update.rank for update in contents[0]), default=1)
            base = contents[1].get("base_model_name_or_path")
            self._known[member] = StoredAdapter(
                label, member, _key(self._store.fingerprint(member), contents), rank, base
            )
        return self._known[member]

    def contents(self, member: str) -> Contents:
        if self._last is None or self._last[0] != member:
            self._last = member, read_adapter(self.current(), member, rank=None)
        return self._last[1]


def _signature(place: str | Path) -> Signature:
    """What changes when another store is written into a folder (members have an index of their own); empty for a Hub id."""
    folder = Path(place)
    if not folder.is_dir():
        return ()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return tuple((str(path), (at := path.stat()).st_ino, at.st_size, at.st_mtime_ns) for path in files)


def _key(digest: str, contents: Contents) -> str:
    """Hash of the member's bytes, of the bases and of what the configuration will say."""
    updates, fields, _ = contents
    names = [(each.target, each.keys) for each in updates]
    described = repr((digest, sorted((name, str(value)) for name, value in fields.items()), names))
    return sha256(described.encode()).hexdigest()[:40]
