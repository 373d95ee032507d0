"""Where each member of a bank lies: blocks of places, the stacks of every module, and the places of a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eigenpeft.subspace import AdapterMember, Core, PrincipalSubspace
from eigenpeft.tuners.serving.blocks import FACTORS, Block, Choice, ModuleStacks, form_of

_FEWEST_PLACES = 256  # of a block that is opened for one more member
Places = tuple[tuple[int, int], ...]
"""Number of a block and place in it, for each form of core that a member has."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A member in the bank: its place in each block that has a core of it, and its heads.

    Attributes:
        places: Number of a block and place in it, for each form of core that the member has.
        heads: Parameters of the modules that it trained in full, by path and name.
        modules: Modules that it adapts.
    """

    places: tuple[tuple[int, int], ...] = ()
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()


class Room(nn.Module):
    """The stacked cores of all members, by module and block. It takes no lock: the bank does.

    Args:
        subspace: The shared bases.
        dtype: Data type of components and cores; None keeps float32.
    """

    def __init__(self, subspace: PrincipalSubspace, *, dtype: torch.dtype | None):
        super().__init__()
        embeddings = subspace.info.embeddings
        self._updates = nn.ModuleList(
            ModuleStacks(module_bank, is_embedding=module in embeddings, dtype=dtype)
            for module, module_bank in subspace.items()
        )
        self._numbers = {module: number for number, module in enumerate(subspace)}
        self._blocks: list[Block] = []

    def of(self, module: str) -> ModuleStacks:
        """Components and cores of one module.

        Args:
            module: Module of the subspace.
        """
        return self._updates[self._numbers[module]]  # pyright: ignore[reportReturnType]

    def take_stacks(
        self, coefficients: Mapping[str, tuple[Tensor, Tensor]], *, n_members: int, dtype: torch.dtype | None
    ) -> int:
        """A block of factors that somebody else stacked; its number.

        Args:
            coefficients: Module to C_in (n_members, r, K_in) and C_out (n_members, K_out, r).
            n_members: How many.
            dtype: Data type of the stacks; None keeps theirs.
        """
        rank = max((coefficients_in.shape[1] for coefficients_in, _ in coefficients.values()), default=0)
        block = self._open_block(FACTORS, n_members, rank=rank)
        for module, stacks in coefficients.items():
            padded = [nn.functional.pad(each, (0, 0, 0, 0, 0, 1)) for each in stacks]
            self.of(module).put_stacks(block, [each.to(dtype or each.dtype) for each in padded])
        self._occupy(block, range(n_members))
        return block

    def fill(self, members: Mapping[str, AdapterMember]) -> dict[str, Places]:
        """Put members into an empty room, one block per form, with as much room as they need.

        Args:
            members: By name.

        Returns:
            Places by name.
        """
        places: dict[str, list[tuple[int, int]]] = {name: [] for name in members}
        for form in dict.fromkeys(form_of(core) for member in members.values() for core in member.values()):
            having = [name for name, member in members.items() if form in map(form_of, member.values())]
            slots = {name: slot for slot, name in enumerate(having)}
            block = self._open_block(form, len(having), rank=0)
            for module in self._numbers:
                own = {name: members[name][module] for name in having if module in members[name]}
                own = {name: core for name, core in own.items() if form_of(core) == form}
                rank = max(map(_rank_of, own.values()), default=0)
                self._blocks[block].rank = max(self._blocks[block].rank, rank)
                if own and (rank or form != FACTORS):
                    self.of(module).make_stacks(block, self._blocks[block], rank=rank)
                    for name, core in own.items():
                        self.of(module).write(block, slots[name], core)
            self._occupy(block, slots.values())
            for name, slot in slots.items():
                places[name].append((block, slot))
        return {name: tuple(found) for name, found in places.items()}

    def put(self, member: AdapterMember, *, oldest_reader: int, n_members: int) -> Places:
        """Put one more member where no batch reads.

        Args:
            member: With cores of any forms.
            oldest_reader: Time at which the oldest batch in progress began.
            n_members: How many there are already; a new block has room for a quarter of them.
        """
        places = []
        for form in dict.fromkeys(form_of(core) for core in member.values()):
            own = {module: core for module, core in member.items() if form_of(core) == form}
            block, slot = self._place(form, own, oldest_reader=oldest_reader, n_members=n_members)
            places.append((block, slot))
            for module, core in own.items():
                self.of(module).write(block, slot, core)
        return tuple(places)

    def give_up(self, places: Places, *, time: int) -> None:
        """Let places be taken again once no batch that began until a time is in progress.

        Args:
            places: Places that a removed member had.
            time: The time.
        """
        for block, slot in places:
            self._blocks[block].retired.append((time, slot))

    def choice(self, rows: Sequence[Entry], *, as_list: bool) -> Choice:
        """Places and heads of the rows of a batch.

        Args:
            rows: Member of each row.
            as_list: Whether logits are wanted as a list of rows.
        """
        zeros: dict[int, int] = {}
        places: dict[int, list[int]] = {}
        for row, entry in enumerate(rows):
            for block, slot in entry.places:
                if block not in places:
                    zeros[block] = self._blocks[block].capacity
                    places[block] = [zeros[block]] * len(rows)
                places[block][row] = slot
        return Choice(places, zeros, [entry.heads for entry in rows], as_list=as_list)

    def weighted_choice(self, rows: Sequence[Sequence[tuple[Entry, float]]], *, as_list: bool) -> Choice:
        """Places of rows that take several members each, with weights; each row has the heads of the one with the largest.

        Args:
            rows: Members of each row and their weights; rows may have different numbers of them.
            as_list: Whether logits are wanted as a list of rows.
        """
        ordered = [sorted(row, key=lambda pair: -pair[1]) for row in rows]
        found = self.choice([row[0][0] for row in ordered], as_list=as_list)
        parts = []
        for rank in range(max(map(len, ordered))):
            own = [row[rank] if rank < len(row) else (Entry(), 0.0) for row in ordered]
            weights = torch.tensor([weight for _, weight in own])
            parts.append((self.choice([entry for entry, _ in own], as_list=False), weights))
        found.weighted = tuple(parts)
        return found

    def _open_block(self, form: str, capacity: int, *, rank: int) -> int:
        self._blocks.append(Block(form, rank, capacity, free=list(range(capacity))))
        return len(self._blocks) - 1

    def _occupy(self, block: int, slots: Iterable[int]) -> None:
        self._blocks[block].free.clear()
        self._blocks[block].used.update(slots)

    def _place(self, form: str, cores: Mapping[str, Core], *, oldest_reader: int, n_members: int) -> tuple[int, int]:
        """A place for a member's cores of one form, in a block that has room for their rank, or in a new one."""
        for number, block in enumerate(self._blocks):
            if block.form != form or not all(self._has_room(number, block, *each) for each in cores.items()):
                continue
            slot = block.take(oldest_reader)
            if slot is None:
                continue
            if slot in block.used:  # what a former member left in modules that this one lacks, or beyond its rank
                for module in self._numbers:
                    self.of(module).write(number, slot, None)
            break
        else:
            rank = max(map(_rank_of, cores.values())) if form == FACTORS else 0
            number = self._open_block(form, max(_FEWEST_PLACES, n_members // 4), rank=rank)
            slot = self._blocks[number].free.pop()
        self._blocks[number].used.add(slot)
        for module in cores:
            self.of(module).make_stacks(number, self._blocks[number], rank=self._blocks[number].rank)
        return number, slot

    def _has_room(self, number: int, block: Block, module: str, core: Core) -> bool:
        if block.form != FACTORS:
            return True
        stacks = self.of(module).parts(number)
        return _rank_of(core) <= (block.rank if stacks is None else stacks[0].shape[1])


def _rank_of(core: Core) -> int:
    return len(core.parts["coefficients_in"]) if core.row.is_factored else 0
