"""Thousands of adapters on one base model in memory, each row of a batch with an adapter of its own."""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eigenpeft.deprecation import moved_names
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import AdapterMember, AdapterStore, PrincipalSubspace
from eigenpeft.subspace.stores.changing import BASE
from eigenpeft.subspace.stores.member import check_core
from eigenpeft.tuners.serving.attachment import Attachment, choose
from eigenpeft.tuners.serving.blocks import Choice, ModuleStacks
from eigenpeft.tuners.serving.heads import heads_of
from eigenpeft.tuners.serving.room import Entry, Room


class AdapterBank(nn.Module):
    """Serves the members of a store on one base model, mixed within a batch, each row with its member's head.

    Row i of a batch, whose member has the core M_i, gets `y_i = W x_i + V_outᵀ M_i V_in x_i`: EigenLoRAx's layer (arXiv
    2502.04700, equation 4) with a core per row, batched as Punica (arXiv 2310.18547) batches LoRAs. x_i
    (in_features,) and y_i (out_features,) are those of one token.

    Memory: one copy of the components and, per member and module, `2 r K` numbers for the core "low_rank", K² for "full"
    and K for "diagonal". A row's member is an index into the stacked cores, so that a batch of 64 members costs one gather
    and a few batched products in each module, not a loop. Members come and go while other threads serve: a batch sees the
    members that were there when its `use` block began.

    Args:
        subspace: The shared bases.
        names: Members, in the order of the coefficients.
        coefficients: Module of the subspace to C_in (n_members, r, n_components) and C_out (n_members, n_components, r),
            scaling included, zeros where a member has a smaller rank or lacks the module. Modules left out are not updated.
        dtype: Data type of components and cores; None keeps the store's float32.

    Raises:
        SubspaceError: If a name appears twice or is "__base__".

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bases = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> stacked = {"0": (torch.ones(5, 1, 2), torch.ones(5, 2, 1))}
        >>> bank = AdapterBank(PrincipalSubspace({"0": bases}), names=[f"task-{i}" for i in range(5)], coefficients=stacked)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> with bank.attached(model), bank.use(["task-3", "__base__"]):
        ...     model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        subspace: PrincipalSubspace,
        *,
        names: Sequence[str] = (),
        coefficients: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.subspace = subspace
        repeated = sorted({name for name in names if names.count(name) > 1 or name == BASE}) if names else []
        if repeated:
            raise SubspaceError(f"Names of members must be unique and not {BASE!r}; rename {', '.join(repeated)}.")
        self._room = Room(subspace, dtype=dtype)
        self._entries: dict[str, Entry] = {}  # never changed in place: swapped, so that a reader sees a whole state
        self._reset()
        if names:
            block = self._room.take_stacks(coefficients or {}, n_members=len(names), dtype=dtype)
            modules = frozenset(coefficients or {})
            self._entries = {name: Entry(((block, row),), {}, modules) for row, name in enumerate(names)}

    def _reset(self) -> None:
        self._lock = RLock()
        self._attachments: list[Attachment] = []
        self._readers: dict[int, int] = {}
        self._tokens, self._time = itertools.count(), 0

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process: the lock, batches in progress, and models it is attached to."""
        state = self.__dict__.copy()
        for name in ("_lock", "_attachments", "_readers", "_tokens"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        time = self._time
        self._reset()
        self._time = time

    @classmethod
    def from_store(
        cls, store: AdapterStore, *, names: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> "AdapterBank":
        """All members of a store, or some, each read once.

        Args:
            store: Members of any kinds and ranks.
            names: Which members; None takes all.
            dtype: Data type of components and cores in memory; None keeps float32.

        Raises:
            KeyError: If the store has no such member.
            SubspaceError: If a member trained something that cannot be served row by row, such as biases; it is named.
            ArtifactError: If a member cannot be read.
        """
        chosen = store.names if names is None else tuple(names)
        bank = cls(store.subspace, dtype=dtype)
        members = {name: store[name] for name in chosen}
        if len(members) != len(chosen):
            cls(store.subspace, names=chosen)  # says which name appears twice
        places = bank._room.fill(members)
        bank._entries = {
            name: Entry(places[name], heads_of(name, member), frozenset(member)) for name, member in members.items()
        }
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def n_bytes(self) -> int:
        """Bytes of components and of the room for cores; heads are those of the store's members."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())

    def add(self, member: AdapterMember, *, name: str | None = None) -> None:
        """Add a member, also while other threads serve; no other member's cores are copied.

        Args:
            member: Member of a store with the same bases: `bank.add(store["new"])`.
            name: Its name in the bank; None takes that in the store.

        Raises:
            SubspaceError: If the name is taken, the member is of other bases, adapts a module that an attached model lacks,
                or trained something that cannot be served row by row.
        """
        name = str(member.record.get("name") or "") if name is None else name
        if not name or name == BASE or name in self._entries:
            raise SubspaceError(
                f"{name!r} cannot be added to the bank: it is {'empty' if not name else 'taken'}. Pass another name=."
            )
        self._check(name, member)
        heads = heads_of(name, member)
        with self._lock:
            for attachment in self._attachments:
                attachment.check(name, member.cores, heads)
            oldest = min(self._readers.values(), default=self._time)
            places = self._room.put(member, oldest_reader=oldest, n_members=len(self._entries))
            self._entries = {**self._entries, name: Entry(places, heads, frozenset(member))}
            self._attachments = [each for each in self._attachments if each.is_alive]
            for attachment in self._attachments:
                attachment.watch(heads)

    def remove(self, name: str) -> None:
        """Remove a member, also while other threads serve: batches that began with it are finished with it.

        Args:
            name: Its name.

        Raises:
            SubspaceError: If there is none.
        """
        with self._lock:
            if name not in self._entries:
                self._refuse([name])
            entry = self._entries[name]
            self._entries = {other: each for other, each in self._entries.items() if other != name}
            self._room.give_up(entry.places, time=self._time)
            self._time += 1

    @contextmanager
    def attached(self, model: nn.Module, *, within: str = "") -> Iterator[None]:
        """`attach` for the length of a block.

        Args:
            model: Base model.
            within: As for `attach`.

        Raises:
            SubspaceError: As `attach`.
        """
        handles = self.attach(model, within=within)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, model: nn.Module, *, within: str = "") -> list[RemovableHandle]:
        """Let the model's modules take the bank's updates and heads inside `use`; outside of it it is the base model.

        Components and cores move to their module's device. The model's weights, names and classes stay. A copy of the model
        (`copy.deepcopy`) is served by the same bank.

        Args:
            model: Model of the base that the subspace was built for, in any wrapping that keeps the modules' names.
            within: Path of the part of the model to serve, such as "language_model", where names fit several parts.

        Returns:
            Handles whose `remove()` undoes it; heads of members that are added later get handles in the same list.

        Raises:
            SubspaceError: If the model lacks modules of the bank, has several that fit one of them, or they have other
                sizes; or if a member's head does not fit the model's.
        """
        with self._lock:
            entries = self._entries
            needed = frozenset().union(*(entry.modules for entry in entries.values())) if entries else frozenset()
            attachment = Attachment(self, model, within=within, needed=needed)
            for name, entry in entries.items():
                attachment.check(name, entry.modules, entry.heads)
            attachment.hook()
            for entry in entries.values():
                attachment.watch(entry.heads)
            self._attachments.append(attachment)
        return attachment.handles

    @contextmanager
    def use(
        self,
        names: Sequence[str | Mapping[str, float]],
        *,
        n_repeats: int = 1,
        logits: Literal["padded", "list"] = "padded",
    ) -> Iterator[None]:
        """Choose the member of each row of the batches that attached models see in the block, in this thread.

        Args:
            names: One name per row; "__base__" for the base model; or the weights of several members, whose updates are added up,
                as `AdapterIndex.route(texts, top_k=3)` gives them. Such a row has the head of the member with the largest weight.
            n_repeats: Rows of the model for each name, one after the other: the number of beams, or of sequences to
                return, of `generate`.
            logits: How heads with different numbers of labels share a batch: "padded" with -inf to the largest number, or
                as a "list" of one tensor per row.

        Raises:
            SubspaceError: If a member is not in the bank (the message names all that are not), weights are not finite numbers,
                or `logits` is neither "padded" nor "list".
        """
        if logits not in ("padded", "list"):
            raise SubspaceError(f'logits={logits!r} must be "padded" or "list".')
        with self._lock:
            token, entries = next(self._tokens), self._entries
            self._readers[token] = self._time
        try:
            with choose(self, self._choice(names, entries, n_repeats=n_repeats, as_list=logits == "list")):
                yield
        finally:
            with self._lock:
                del self._readers[token]

    def _choice(
        self,
        names: Sequence[str | Mapping[str, float]],
        entries: Mapping[str, Entry],
        *,
        n_repeats: int,
        as_list: bool,
    ) -> Choice:
        if all(isinstance(each, str) for each in names):
            rows = [entries.get(name, _NOTHING) for name in names]  # pyright: ignore[reportCallIssue, reportArgumentType]
            if _NOTHING in rows:
                self._refuse_unknown(names, entries)  # pyright: ignore[reportArgumentType]
            if n_repeats != 1:
                rows = [entry for entry in rows for _ in range(n_repeats)]
            return self._room.choice(rows, as_list=as_list)
        self._refuse_unknown([name for each in names for name in ([each] if isinstance(each, str) else each)], entries)
        mixed = [{each: 1.0} if isinstance(each, str) else dict(each) for each in names]
        for row, weights in enumerate(mixed):
            if not weights or not all(math.isfinite(weight) for weight in weights.values()):
                raise SubspaceError(f"Row {row} has the weights {weights}; give at least one member a finite number.")
        several = [[(entries.get(name, _NOTHING), weight) for name, weight in weights.items()] for weights in mixed]
        return self._room.weighted_choice([row for row in several for _ in range(n_repeats)], as_list=as_list)

    def _refuse_unknown(self, asked: Sequence[str], entries: Mapping[str, Entry]) -> None:
        unknown = [name for name in dict.fromkeys(asked) if name not in entries and name != BASE]
        if unknown:
            self._refuse(unknown)

    def tasks(self, names: Sequence[str], *, n_repeats: int = 1) -> Any:
        """Old name of `use`.

        Args:
            names: As for `use`.
            n_repeats: As for `use`.

        Raises:
            SubspaceError: As `use`.
        """
        warnings.warn(
            "AdapterBank.tasks is deprecated and goes away in the next minor version; use AdapterBank.use.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.use(names, n_repeats=n_repeats)

    def stacks(self, module: str) -> ModuleStacks:
        """Components and cores of one module.

        Args:
            module: Module of the subspace.
        """
        return self._room.of(module)

    def _check(self, name: str, member: AdapterMember) -> None:
        own = member.subspace_sha256
        if own is not None and own != self.subspace.fingerprint:
            raise SubspaceError(
                f"{name!r} is a member of a store whose bases have fingerprint {own}, and those of the bank have "
                f"{self.subspace.fingerprint}. Move that store to these bases first, with rebase()."
            )
        for module, core in member.items() if own is None else ():  # what comes out of a store was checked there
            check_core(core, module, self.subspace)

    def _refuse(self, unknown: Sequence[str]) -> None:
        near = {name: get_close_matches(str(name), self.names, n=1) for name in unknown[:5]}
        shown = ", ".join(
            f"{name!r}" + (f" (did you mean {fits[0]!r}?)" if fits else "") for name, fits in near.items()
        )
        raise SubspaceError(
            f"{len(unknown)} of the members asked for are not in the bank of {len(self)}: {shown}"
            f"{', ...' if len(unknown) > 5 else ''}. Its names are in `bank.names`; {BASE!r} is the base model."
        )


_NOTHING = Entry()


__getattr__ = moved_names(__name__, {"TaskBank": "eigenpeft.AdapterBank"})
