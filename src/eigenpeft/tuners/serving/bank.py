"""Thousands of tasks on one base model in memory, each row of a batch with a task of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import AdapterMember, AdapterStore, PrincipalSubspace
from eigenpeft.tuners.layers.routes import add_updates, owns_output

BASE = "__base__"
"""Name of the task that is the base model itself, as in PEFT's `adapter_names`."""


class TaskBank(nn.Module):
    """Serves all members of a coefficient store on one base model, mixed within a batch.

    Memory: one copy of the components, and `2 r K` numbers a task and module. A row's task is an index into the stacked
    coefficients, so that a batch of 64 tasks costs one gather and a few batched products in each module, not a loop.

    Only updates of the weights are served: heads that an adapter trained in full are not in a store.

    Args:
        subspace: The shared bases.
        names: Tasks, in the order of the coefficients.
        coefficients: Module of the subspace to C_in (n_tasks, r, n_components) and C_out (n_tasks, n_components, r),
            scaling included, zeros where a task has a smaller rank or lacks the module. Modules left out are not updated.
        dtype: Of components and coefficients; None keeps the store's float32.

    Raises:
        SubspaceError: If a name appears twice or is "__base__".

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> bases = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), torch.ones(2), torch.ones(2), torch.ones(2) / 2)
        >>> stacked = {"0": (torch.ones(5, 1, 2), torch.ones(5, 2, 1))}
        >>> bank = TaskBank(PrincipalSubspace({"0": bases}), names=[f"task-{i}" for i in range(5)], coefficients=stacked)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> with bank.attached(model), bank.tasks(["task-3", "__base__"]):
        ...     model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        subspace: PrincipalSubspace,
        *,
        names: Sequence[str],
        coefficients: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.subspace = subspace
        self.names = tuple(names)
        self._rows = {name: row for row, name in enumerate(self.names)} | {BASE: len(self.names)}
        if len(self._rows) != len(self.names) + 1:
            repeated = sorted({name for name in self.names if self.names.count(name) > 1 or name == BASE})
            raise SubspaceError(f"Names of tasks must be unique and not {BASE!r}; rename {', '.join(repeated)}.")
        self._updates = nn.ModuleDict()
        for module, (inside, outside) in coefficients.items():
            bases = subspace[module]
            self._updates[_key(module)] = _StackedUpdate(
                bases.components_in, inside, outside, bases.components_out, dtype=dtype
            )

    @classmethod
    def from_store(
        cls, store: AdapterStore, *, names: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> "TaskBank":
        """All members of a store, or some, read module by module.

        Args:
            store: Members of any ranks.
            names: Which members; None takes all.
            dtype: Of components and coefficients in memory; None keeps float32.

        Raises:
            KeyError: If the store has no such member.
        """
        members = [store[name] for name in (store.names if names is None else names)]
        coefficients = {}
        for module in store.subspace:
            inside, outside = _padded(members, module, store.subspace[module].n_components)
            if inside.shape[1]:  # some task adapts the module
                coefficients[module] = (inside.to(dtype or inside.dtype), outside.to(dtype or outside.dtype))
        chosen = store.names if names is None else tuple(names)
        return cls(store.subspace, names=chosen, coefficients=coefficients, dtype=dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of components and coefficients in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """`attach` for the length of a block.

        Args:
            model: Base model.
        """
        handles = self.attach(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Let the model's modules take the bank's updates inside `tasks`; outside of it the model is the base model.

        Components and coefficients move to their module's device. The model's weights, names and classes stay.

        Args:
            model: Model of the base that the subspace was built for, in any wrapping that keeps the modules' names.

        Returns:
            Handles whose `remove()` undoes it.

        Raises:
            SubspaceError: If the model lacks modules of the bank, or they have other sizes.
        """
        found = {}
        for path, module in model.named_modules():
            name = self.subspace.find(path) if isinstance(getattr(module, "weight", None), Tensor) else None
            if name is not None and _key(name) in self._updates:
                found[name] = module
        missing = [name for name in self.subspace if _key(name) in self._updates and name not in found]
        if missing:
            raise SubspaceError(
                f"{len(missing)} of the bank's {len(self._updates)} modules, such as {missing[0]!r}, are not in the model "
                f"({type(model).__name__}). Use a model of the base that the subspace was built for."
            )
        for name, module in found.items():
            bases = self.subspace[name]
            if module.weight.ndim == 2 and sorted(module.weight.shape) != sorted(
                (bases.in_features, bases.out_features)
            ):
                raise SubspaceError(
                    f"{name!r} has a weight of {tuple(module.weight.shape)} in the model and takes {bases.in_features} "
                    f"to {bases.out_features} features in the subspace. Use the base that the subspace was built for."
                )
        handles = []
        for name, module in found.items():
            update = self._updates[_key(name)].to(module.weight.device)
            handles.append(module.register_forward_hook(_Hook(self, update, name)))
        return handles

    @contextmanager
    def tasks(self, names: Sequence[str], *, n_repeats: int = 1) -> Iterator[None]:
        """Choose the task of each row of the batches that attached models see in the block, in this thread.

        Args:
            names: One task a row; "__base__" for the base model.
            n_repeats: Rows of the model for each name, one after the other: the number of beams, or of sequences to
                return, of `generate`.

        Raises:
            SubspaceError: If a task is not in the bank; the message names all that are not.
        """
        unknown = [name for name in dict.fromkeys(names) if name not in self._rows]
        if unknown:
            near = {name: get_close_matches(name, self.names, n=1) for name in unknown[:5]}
            shown = ", ".join(
                f"{name!r}" + (f" (did you mean {fits[0]!r}?)" if fits else "") for name, fits in near.items()
            )
            raise SubspaceError(
                f"{len(unknown)} of the tasks asked for are not in the bank of {len(self.names)}: {shown}"
                f"{', ...' if len(unknown) > 5 else ''}. Its names are in `bank.names`; {BASE!r} is the base model."
            )
        rows = torch.tensor([self._rows[name] for name in names], dtype=torch.int64)
        token = _chosen.set({**_chosen.get(), id(self): _Rows(rows.repeat_interleave(n_repeats))})
        try:
            yield
        finally:
            _chosen.reset(token)


class _Rows:
    """Rows of the stacked coefficients, copied to each device once."""

    def __init__(self, rows: Tensor):
        self._on_device = {rows.device: rows}
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._rows.to(device)
        return self._on_device[device]


_chosen: ContextVar[Mapping[int, _Rows]] = ContextVar("eigenpeft_tasks", default={})  # noqa: B039 (never changed in place)


class _StackedUpdate(nn.Module):
    """Components of one module and the coefficients of all tasks, with a last task of zeros: the base model."""

    components_in: Tensor
    coefficients_in: Tensor
    coefficients_out: Tensor
    components_out: Tensor

    def __init__(
        self,
        components_in: Tensor,
        coefficients_in: Tensor,
        coefficients_out: Tensor,
        components_out: Tensor,
        *,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        tensors = {
            "components_in": components_in,
            "coefficients_in": _with_zero_task(coefficients_in),
            "coefficients_out": _with_zero_task(coefficients_out),
            "components_out": components_out,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(dtype or tensor.dtype), persistent=False)

    def forward(self, y: Tensor, x: Tensor, rows: Tensor, *, in_place: bool) -> Tensor:
        return add_updates(
            y,
            x,
            rows,
            components_in=self.components_in,
            coefficients_in=self.coefficients_in,
            coefficients_out=self.coefficients_out,
            components_out=self.components_out,
            in_place=in_place,
        ).to(y.dtype)


class _Hook:
    """Forward hook of one module; does nothing outside of `TaskBank.tasks`."""

    def __init__(self, bank: TaskBank, update: nn.Module, name: str):
        self.bank, self.update, self.name = bank, update, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rows = _chosen.get().get(id(self.bank))
        if rows is None:
            return None
        x = args[0]
        if len(x) != len(rows):
            raise SubspaceError(
                f"{self.name!r} got {len(x)} rows for {len(rows)} tasks. Name one task a row in bank.tasks(...), with "
                "n_repeats= for beams; models that flatten sequences into rows cannot be served mixed."
            )
        return self.update(output, x, rows.on(x.device), in_place=owns_output(module, n_hooks=1))


def _padded(members: Sequence[AdapterMember], module: str, n_components: int) -> tuple[Tensor, Tensor]:
    factors = [member[module].factors() if module in member else None for member in members]
    rank = max((len(pair[1]) for pair in factors if pair is not None), default=0)
    inside = torch.zeros(len(members), rank, n_components)
    outside = torch.zeros(len(members), n_components, rank)
    for row, pair in enumerate(factors):
        if pair is not None:
            outside[row, : len(pair[0]), : pair[0].shape[1]] = pair[0]
            inside[row, : len(pair[1]), : pair[1].shape[1]] = pair[1]
    return inside, outside


def _with_zero_task(coefficients: Tensor) -> Tensor:
    return nn.functional.pad(coefficients, (0, 0, 0, 0, 0, 1))


def _key(module: str) -> str:
    return module.replace(".", "/")  # names of submodules take no dots
