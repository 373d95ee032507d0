"""One subspace and many adapters in it, each with its core, its head and its record, each read and written alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.pushing import Pushable
from eigenpeft.artifacts.records.log import RecordLog
from eigenpeft.artifacts.records.source import MemoryRecords
from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.deprecation import moved_names
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.stores.absorbing import AbsorbReport, absorb
from eigenpeft.subspace.stores.adapter_files import check_base, projected, read_adapter, read_model
from eigenpeft.subspace.stores.changing import check_new_name, writable
from eigenpeft.subspace.stores.format_1 import Format1Records
from eigenpeft.subspace.stores.member import AdapterMember, check_core
from eigenpeft.subspace.stores.members import AdapterMembers
from eigenpeft.subspace.stores.moving import move_member
from eigenpeft.subspace.stores.store_files import (
    card_of,
    check_bases,
    has_bases,
    open_store,
    renew_card,
    replace_bases,
    upgrade,
    write_card,
    write_store,
)


class AdapterStore(Pushable, AdapterMembers):
    """Adapters in one subspace by name: `store["my-adapter"]["encoder.layer.0.attention.self.query"]` is a `Core`.

    Members keep what they are: an adapter that was trained in the subspace its own core, bit for bit; a LoRA adapter its
    projection, with the error; both their heads, biases and trained tokens. A store that was opened or saved has a folder,
    and every change is written there at once, without touching the other members. Reading one member reads no other.

    Args:
        subspace: The bases that the cores refer to.
        members: Members by name, in memory until `save_pretrained`.

    Raises:
        SubspaceError: If a member does not fit the bases.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import AdapterMember, AdapterStore, Core, ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> mine = AdapterMember({"layer": Core("diagonal", {"coefficients_out": torch.tensor([3.0, 1.0])})})
        >>> AdapterStore(PrincipalSubspace({"layer": bank}), members={"mine": mine}).cores("layer").shape
        torch.Size([1, 2, 2])
    """

    label = storage.STORE.label

    def __init__(self, subspace: PrincipalSubspace, *, members: Mapping[str, AdapterMember] | None = None):
        self.subspace = subspace
        self.origin: str | None = None
        self.revision: str | None = None
        self._records = MemoryRecords()
        for name, member in (members or {}).items():
            self._put(name, member, replace=False)

    @classmethod
    def from_collection(cls, subspace: PrincipalSubspace, collection: AdapterCollection) -> "AdapterStore":
        """Project every adapter of a collection, and measure what is lost.

        Args:
            subspace: Bases to project on.
            collection: Adapters of the same base model. Modules that the subspace lacks are an error: their update
                would be dropped without a trace.

        Raises:
            SubspaceError: If an adapter adapts a module that is not in the subspace, or shapes differ.
            CollectionError: If a tensor cannot be read or is not finite.
        """
        store = cls(subspace)
        for name in tqdm(collection.names, desc="Projecting", unit="adapter"):
            store._put(name, projected(collection, name, subspace), replace=False)
        return store

    @property
    def folder(self) -> Path | None:
        """Where changes are written; None while the store is only in memory, or read-only."""
        return self._records.folder if isinstance(self._records, RecordLog) and self.revision is None else None

    def add(
        self,
        adapter: Any,
        *,
        name: str | None = None,
        adapter_name: str = "default",
        replace: bool = False,
        allow_different_base_models: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> AdapterMember:
        """Add one adapter. Where the store has a folder, the member is written there and nothing else is (nor the card).

        Args:
            adapter: A trained `PeftModel`; the folder or Hub id of an adapter of peft_type EIGENLORA (kept bit for bit, in
                its own core) or LORA (projected, its error recorded); "STORE#MEMBER", or a member of a store with the same
                bases.
            name: Name in the store; None takes that of the folder, the repository, the member, or `adapter_name`.
            adapter_name: Which adapter of a model.
            replace: Take the place of a member of that name.
            allow_different_base_models: Take a LoRA adapter whose config names another base model than the subspace's.
            token: Token for the Hub.
            cache_dir: Cache of the Hub.
            local_files_only: Use downloaded files only.

        Returns:
            The member as it is kept.

        Raises:
            SubspaceError: If the name is taken, `adapter` is of another type, there is no store where "STORE#MEMBER" says, or
                the adapter does not fit the bases or has something that a store does not keep; the message names it.
            CollectionError: If its files cannot be read.
            ArtifactError: If the store cannot be written, or another process is writing it; or if the other store is damaged.
            KeyError: If the store of "STORE#MEMBER" has no such member.
        """
        options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if isinstance(adapter, AdapterMember):
            own, member = str(adapter.record.get("name") or ""), adapter
        elif hasattr(adapter, "peft_config"):
            own, member = adapter_name, read_model(adapter, self.subspace, adapter_name=adapter_name)
        elif isinstance(adapter, str) and "#" in adapter and not Path(adapter).exists():
            place, _, own = adapter.partition("#")
            member = AdapterStore.from_pretrained(place, **options)[own]
        elif isinstance(adapter, str | Path):
            options["allow_different_base_models"] = allow_different_base_models
            own, member = read_adapter(adapter, self.subspace, **options)
        else:
            raise SubspaceError(
                f"add() takes a PeftModel, a folder, a Hub id, 'STORE#MEMBER' or a member of a store, not a "
                f"{type(adapter).__name__}."
            )
        name = own if name is None else name
        self._put(name, member, replace=replace)
        return member

    def remove(self, name: str) -> None:
        """Remove a member; its bytes on disk go with the next `compact`.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is none.
            ArtifactError: If the store cannot be written, or another process is writing it.
        """
        self._check_name(name)
        self._writable().remove(name)

    def rename(self, name: str, new_name: str) -> None:
        """Give a member another name.

        Args:
            name: Its name.
            new_name: A name that no member has.

        Raises:
            KeyError: If there is no such member.
            SubspaceError: If the new name is taken or no name.
            ArtifactError: If the store cannot be written, or another process is writing it.
        """
        self._check_name(name)
        check_new_name(new_name, self._records, replace=False)
        self._writable().rename(name, new_name)

    def refresh(self) -> bool:
        """See what other processes have added, removed or absorbed since; returns whether there was anything.

        Raises:
            ArtifactError: If the files were altered.
            SubspaceError: If the store's folder is gone, or holds bases that are none.
        """
        if not isinstance(self._records, RecordLog):
            return False
        is_changed = self._records.refresh()
        if self.folder is not None and not has_bases(self.folder, self.subspace):
            opened = AdapterStore.from_pretrained(self.folder)
            self.subspace, self._records, is_changed = opened.subspace, opened._records, True
        return is_changed

    def compact(self) -> int:
        """Join the members' files, drop what was removed, renew the card; a store of format 1 becomes one of the present one.

        A process that is stopped meanwhile leaves the store as it was, or compacted.

        Returns:
            Bytes that became free.

        Raises:
            ArtifactError: If a member is damaged (nothing is changed then), the store cannot be written, or another process
                is writing it.
        """
        if isinstance(self._records, Format1Records):
            if self.revision is not None:
                self._writable()
            folder = Path(str(self.origin))
            self._records = upgrade(folder, self.subspace, self._each(), card=self.card())
            return 0
        records = self._writable()
        if isinstance(records, MemoryRecords):
            return 0
        freed = records.compact(progress=lambda each: tqdm(each, total=len(records), desc="Joining", unit="adapter"))
        renew_card(records.folder, self.card())
        return freed

    def rebase(self, subspace: PrincipalSubspace, *, out_dir: str | Path | None = None) -> "AdapterStore":
        """All members in other bases: `M' = (V'_out V_outᵀ) M (V_in V'_inᵀ)`; this store stays as it is.

        Exact while the old span lies in the new one, as after adding components. What it loses is added to each member's
        relative errors, which are then upper bounds of the error against the original adapter.

        Args:
            subspace: New bases of the same modules.
            out_dir: Folder to make; None keeps the new store in memory.

        Returns:
            The new store.

        Raises:
            SubspaceError: If the new subspace lacks a module that a member adapts, or has it in another shape.
            ArtifactError: If the folder exists or cannot be written, or a member cannot be read.
        """
        moved = AdapterStore(subspace)
        if out_dir is not None:
            moved.save_pretrained(out_dir)
        for name in tqdm(self.names, desc="Moving", unit="adapter"):
            moved._put(name, move_member(self[name], self.subspace, subspace), replace=False)
        return moved

    def absorb(
        self,
        adapters: AdapterCollection | str | Path | Sequence[str | Path],
        *,
        held_share: float = 0.95,
        max_components: int | None = None,
        replace: bool = False,
        allow_different_base_models: bool = False,
    ) -> AbsorbReport:
        """Add LoRA adapters, and let the subspace grow by the directions that it lacks of them.

        The old components stay the first ones, so that no member changes and adapters trained on the earlier bases still fit.
        Where that would exceed `max_components`, the bases are fitted anew to all members and the new adapters, and every
        member is moved, its loss added to its relative errors. The folder is replaced whole, in one step.

        Args:
            adapters: LoRA adapters of the same base model: a collection, or what `AdapterCollection.from_pretrained` takes.
            held_share: Share of the new adapters' squared ΔW norms (each adapter counts equally) that every bank is to hold, in
                (0, 1]; 1 takes all their directions.
            max_components: Largest number of components of a side; None (default) for no bound.
            replace: Take the place of members of the same names.
            allow_different_base_models: Take adapters whose config names another base model than the subspace's.

        Returns:
            What grew, what was lost, and by whom.

        Raises:
            SubspaceError: If a name is taken, shapes differ, or an argument is out of range; nothing has changed then.
            CollectionError: If an adapter cannot be read.
            ArtifactError: If the store cannot be written, or another process is writing it.

        Examples:
            >>> from eigenpeft.building import build_subspace
            >>> from eigenpeft.demo import shipped_adapters
            >>> store = AdapterStore(build_subspace([shipped_adapters() / "cr"], n_components=4))
            >>> store.absorb(shipped_adapters() / "mr", held_share=1.0).held_after > 0.999
            True
        """
        options: Any = {"allow_different_base_models": allow_different_base_models}
        records = self._writable()
        with (
            nullcontext(adapters)
            if isinstance(adapters, AdapterCollection)
            else AdapterCollection.from_pretrained(adapters, **options) as collection,
            records.writing() if isinstance(records, RecordLog) else nullcontext(),
        ):
            for adapter in () if allow_different_base_models else collection.adapters:
                check_base(adapter, self.subspace)
            if isinstance(records, RecordLog):
                check_bases(records.folder, self.subspace)
            for name in collection.names:
                check_new_name(name, self._records, replace=replace)
            subspace, report, moved = absorb(self, collection, held_share=held_share, max_components=max_components)
            data = moved or dict(self._each())
            data |= {name: projected(collection, name, subspace).to_bytes() for name in collection.names}
            if isinstance(records, RecordLog):
                card = card_of(subspace, tuple(data), data.__getitem__)
                self._records = replace_bases(records, subspace, data, card=card)
            else:
                self._records = MemoryRecords(data)
        self.subspace = subspace
        return report

    def files(self) -> tuple[str, ...]:
        """Paths of the files that make up a saved store, relative to its folder, without the model card."""
        if isinstance(self._records, RecordLog):
            kind = storage.SUBSPACE
            return (kind.config_name, kind.tensors_name, *self._records.files(), storage.STORE.config_name)
        return (storage.STORE_1.config_name, storage.STORE_1.tensors_name)

    def card(self) -> str:
        """Text of the model card, complete without editing.

        Raises:
            ArtifactError: If a member cannot be read.
        """
        return card_of(self.subspace, self.names, self._records.read)

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the store to a folder, whole or not at all; from then on, changes are written there.

        Args:
            save_directory: Folder to make. Where this store is there already, only its model card is written anew.
            overwrite: Whether to replace another store there, which must have been written by eigenpeft.

        Raises:
            ArtifactError: If another store is there, or the folder cannot be written or holds something that is not
                replaced.
        """
        folder = Path(save_directory)
        if self.folder is not None and folder.is_dir() and folder.samefile(self.folder):
            write_card(folder, self.card())
            return
        write_store(folder, self.subspace, self._each(), card=self.card(), overwrite=overwrite)
        self._records = RecordLog(folder)
        self.origin, self.revision = str(save_directory), None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "AdapterStore":
        """Open a store; the bases are read and checked, members are read and checked when asked for.

        Args:
            path_or_id: Folder, or Hub id `owner/name`; a copy from the Hub is read-only until it is saved elsewhere.
            revision: Hub branch, tag or commit.
            token: Hub token; None takes the logged-in one.
            cache_dir: Hub cache.
            local_files_only: Use the Hub cache alone.

        Raises:
            SubspaceNotFoundError: If there is none at that place.
            ArtifactError: If files are missing, truncated or altered.
            SubspaceError: If the tensors of its bases do not fit each other.
        """
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where = storage.locate(path_or_id, storage.STORE, storage.STORE_1, local_files_only=local_files_only, **options)
        subspace, records = open_store(where)
        store = cls(subspace)
        store._records, store.origin, store.revision = records, where.origin, where.revision
        return store

    def _write_to(self, folder: Path) -> None:
        write_store(folder, self.subspace, self._each(), card=self.card())

    def _put(self, name: str, member: AdapterMember, *, replace: bool) -> None:
        check_new_name(name, self._records, replace=replace)
        own, expected = member.subspace_sha256, self.subspace.fingerprint
        if own is not None and not self.subspace.has_been(own):
            raise SubspaceError(
                f"{name!r} is a member of a store whose bases have fingerprint {own}, and those here have {expected}. Move "
                "that store to these bases first, with rebase()."
            )
        for module, core in member.items():
            try:
                check_core(core, module, self.subspace)
            except SubspaceError as error:
                raise SubspaceError(f"{name!r} cannot be kept in the store: {error}.") from error
        records, data = self._writable(), dataclasses.replace(member, subspace_sha256=expected).to_bytes()
        if isinstance(records, RecordLog):
            records.append(name, data, replace=replace, check=lambda: check_bases(records.folder, self.subspace))
        else:
            records.append(name, data)

    def _writable(self) -> RecordLog | MemoryRecords:
        return writable(self._records, origin=self.origin, revision=self.revision)


__getattr__ = moved_names(__name__, {"CoefficientStore": "eigenpeft.AdapterStore"})
