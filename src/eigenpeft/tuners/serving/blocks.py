"""The cores of many members, stacked by form: room for members is added in blocks, so that nothing is copied to grow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenpeft.linalg.layer_update import core_updates
from eigenpeft.subspace import Core, ModuleSubspace
from eigenpeft.tuners.layers.routes import add_updates, compute_dtype

FACTORS, FULL, DIAGONAL = "factors", "full", "diagonal"


def form_of(core: Core) -> str:
    """How a bank keeps a core: as two factors, as a matrix, or as a diagonal.

    Args:
        core: Core of any kind; a kind that is none of the three is kept as the matrix that it amounts to.
    """
    if core.row.is_factored:
        return FACTORS
    return FULL if core.row.is_matrix else DIAGONAL


@dataclass
class Block:
    """Room for members whose cores have one form.

    Attributes:
        form: "factors", "full" or "diagonal".
        rank: Largest r of factors; 0 for the other forms.
        capacity: Members that fit.
        free: Places that no member has.
        retired: Places that batches in progress may still read, each with the time at which it was given up.
        used: Places that have had a member and may hold other numbers than zeros.
    """

    form: str
    rank: int
    capacity: int
    free: list[int] = field(default_factory=list)
    retired: list[tuple[int, int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)

    def take(self, oldest_reader: int) -> int | None:
        """A free place, or None.

        Args:
            oldest_reader: Time at which the oldest batch in progress began; what was given up later may still be read.
        """
        waiting = []
        for time, slot in self.retired:
            if time < oldest_reader:
                self.free.append(slot)
            else:
                waiting.append((time, slot))
        self.retired = waiting
        return self.free.pop() if self.free else None


class ModuleStacks(nn.Module):
    """The components of one module and the cores of all members there.

    In each block's stack the last place holds zeros: the base model, and members of other blocks.

    Args:
        module_bank: Bank of the module.
        is_embedding: Whether inputs are tokens.
        dtype: Data type of components and stacks; None keeps float32.
    """

    components_in: Tensor
    components_out: Tensor

    def __init__(self, module_bank: ModuleSubspace, *, is_embedding: bool, dtype: torch.dtype | None):
        super().__init__()
        self.is_embedding = is_embedding
        self._stacked: dict[int, int] = {}  # block to the number of parts that its stacks have here
        for name in ("components_in", "components_out"):
            tensor = getattr(module_bank, name)
            self.register_buffer(name, tensor.to(dtype or tensor.dtype), persistent=False)

    def parts(self, block: int) -> tuple[Tensor, ...] | None:
        """The stacks of a block; None where none of its members adapts the module.

        Args:
            block: Number of the block.
        """
        if block not in self._stacked:
            return None
        return tuple(getattr(self, f"block_{block}_{part}") for part in range(self._stacked[block]))

    def put_stacks(self, block: int, stacks: Sequence[Tensor]) -> None:
        """Take stacks that somebody else made.

        Args:
            block: Number of the block.
            stacks: C_in (capacity + 1, r, K_in) and C_out (capacity + 1, K_out, r); or M (capacity + 1, K_out, K_in); or the
                diagonals (capacity + 1, K).
        """
        for part, stack in enumerate(stacks):
            self.register_buffer(f"block_{block}_{part}", stack, persistent=False)
        self._stacked[block] = len(stacks)  # last: from here on, batches see them

    def make_stacks(self, number: int, block: Block, *, rank: int) -> None:
        """Stacks of zeros for a block, unless it has some.

        Args:
            number: Number of the block.
            block: The block.
            rank: r of factors.
        """
        if number in self._stacked:
            return
        n_in, n_out, places = len(self.components_in), len(self.components_out), block.capacity + 1
        shapes = {
            FACTORS: [(places, rank, n_in), (places, n_out, rank)],
            FULL: [(places, n_out, n_in)],
            DIAGONAL: [(places, n_in)],
        }[block.form]
        like = self.components_in
        # Zeros that the system hands out untouched: memory is taken as places are filled.
        self.put_stacks(number, [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes])

    def write(self, number: int, slot: int, core: Core | None) -> None:
        """Put a member's core at a place of zeros that no batch reads; None makes it one.

        Args:
            number: Number of the block.
            slot: The place.
            core: The core, in the block's form or one that amounts to it.
        """
        stacks = self.parts(number)
        if stacks is None:
            return
        if core is None:
            for stack in stacks:
                stack[slot].zero_()
        elif len(stacks) == 2:
            coefficients_out, coefficients_in = core.row.to_factors(core.parts)
            stacks[0][slot, : len(coefficients_in), : coefficients_in.shape[1]] = coefficients_in
            _copy_scaled(
                stacks[1][slot, : len(coefficients_out), : coefficients_out.shape[1]], coefficients_out, core.scaling
            )
        elif stacks[0].ndim == 3:
            _copy_scaled(
                stacks[0][slot, : core.n_components_out, : core.n_components_in],
                core.row.to_dense(core.parts),
                core.scaling,
            )
        else:
            diagonal = core.parts["coefficients_out"]
            _copy_scaled(stacks[0][slot, : len(diagonal)], diagonal, core.scaling)

    def forward(self, y: Tensor, x: Tensor, chosen: "Choice", *, in_place: bool) -> Tensor | None:
        """`y` with the updates of the members that are chosen; None where none of them adapts the module.

        Args:
            y: Output of the base layer, (batch, ..., out_features).
            x: Its input, (batch, ..., in_features); (batch, ...) indices for an embedding.
            chosen: Places of the batch's rows.
            in_place: Without gradients, write over y.
        """
        blocks = [block for block in chosen.places if block in self._stacked]
        if not blocks:
            return None
        if len(blocks) == 1 and self._stacked[blocks[0]] == 2 and not self.is_embedding:
            stacks = self.parts(blocks[0])
            assert stacks is not None
            sum_ = add_updates(
                y,
                x,
                chosen.slots(blocks[0], x.device),
                components_in=self.components_in,
                coefficients_in=stacks[0],
                coefficients_out=stacks[1],
                components_out=self.components_out,
                in_place=in_place,
            )
            return sum_.to(y.dtype)
        dtype = y.dtype if self.is_embedding else compute_dtype(x)
        if self.is_embedding:
            projected = F.embedding(x, self.components_in.mT).to(dtype)
        else:
            projected = F.linear(x.to(dtype), self.components_in.to(dtype))
        groups = []
        for block in blocks:
            rows, slots = chosen.rows_of(block, x.device)
            groups.append((rows, tuple(stack[slots].to(dtype) for stack in self.parts(block) or ())))
        sum_ = core_updates(
            y.to(dtype).reshape(len(y), -1, y.shape[-1]),
            projected.reshape(len(x), -1, projected.shape[-1]),
            groups,
            components_out=self.components_out.to(dtype),
            in_place=in_place and not torch.is_grad_enabled(),
        )
        return sum_.view(y.shape).to(y.dtype)


class Choice:
    """Which member each row of a batch takes, as places in blocks; copied to each device once.

    Args:
        places: Block to a place for each row, the block's last place for rows of other blocks.
        zeros: Block to that last place.
        heads: Per row the modules that its member trained in full, by path, each with its parameters.

    Attributes:
        widths: Number of logits of each row, once a head has given rows different ones.
        as_list: Whether logits are wanted as a list of rows.
        weighted: Where rows take several members each: choices of one member per row with the rows' weights, which add up to the
            update; this choice then gives the heads alone.
    """

    def __init__(
        self,
        places: Mapping[int, Sequence[int]],
        zeros: Mapping[int, int],
        heads: Sequence[Mapping[str, Mapping[str, Tensor]]],
        *,
        as_list: bool = False,
    ):
        self.places = {block: torch.tensor(slots, dtype=torch.int64) for block, slots in places.items()}
        self.heads = heads
        self.as_list = as_list
        self.weighted: tuple[tuple[Choice, Tensor], ...] = ()
        self.widths: list[int] | None = None
        self._zeros = zeros
        self._on_device: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.heads)

    def slots(self, block: int, device: torch.device) -> Tensor:
        """A place for each row of the batch, (batch,) int64.

        Args:
            block: Number of the block.
            device: Where they are wanted.
        """
        key = block, device
        if key not in self._on_device:
            self._on_device[key] = self.places[block].to(device)
        return self._on_device[key]

    def rows_of(self, block: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The rows whose members are in a block, (n,) int64 (None if all are), and their places, (n,) int64.

        Args:
            block: Number of the block.
            device: Where they are wanted.
        """
        key = block, device, "rows"
        if key not in self._on_device:
            slots = self.places[block]
            rows = (slots != self._zeros[block]).nonzero().flatten()
            whole = len(rows) == len(slots)
            self._on_device[key] = (None if whole else rows.to(device)), slots[rows].to(device)
        return self._on_device[key]

    def cached(self, key: Any, make: Any) -> Any:
        """What `make()` gave the first time it was asked for.

        Args:
            key: Key of the cache.
            make: Called without arguments.
        """
        if key not in self._on_device:
            self._on_device[key] = make()
        return self._on_device[key]


def _copy_scaled(place: Tensor, numbers: Tensor, scaling: float) -> None:
    # In the numbers' own precision, and few operations: each one may have to wait for threads that serve.
    place.copy_(numbers if scaling == 1.0 else numbers * scaling)
