"""A model that a bank serves: which of its modules are the bank's, and the hooks that give them updates and heads."""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eigenpeft.collection.opening import some
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.matching import match_modules
from eigenpeft.tuners.layers.routes import owns_output
from eigenpeft.tuners.serving.blocks import Choice, ModuleStacks
from eigenpeft.tuners.serving.heads import State, check_head, head_outputs, listed

_logger = logging.getLogger(__name__)
_chosen: ContextVar[Mapping[int, Choice]] = ContextVar("eigenpeft_members", default={})  # noqa: B039 (never changed in place)


@contextmanager
def choose(bank: Any, choice: Choice | None) -> Iterator[None]:
    """Let a bank serve a choice in a block, in this thread and this asyncio task.

    Args:
        bank: The bank.
        choice: Which member each row takes; None serves the base model.
    """
    others = {key: each for key, each in _chosen.get().items() if key != id(bank)}
    token = _chosen.set(others if choice is None else {**others, id(bank): choice})
    try:
        yield
    finally:
        _chosen.reset(token)


class Attachment:
    """One model and one bank.

    Args:
        bank: The bank.
        model: Model of its base.
        within: Path of the part of the model to look at; empty for all of it.
        needed: Modules of the subspace that members of the bank adapt.

    Attributes:
        handles: Handles of the hooks that are in place.

    Raises:
        SubspaceError: If the model lacks a needed module, has several that fit one, or one of another size.
    """

    def __init__(self, bank: Any, model: nn.Module, *, within: str, needed: Iterable[str]):
        self._bank, self._model = bank, weakref.ref(model)
        self.handles: list[RemovableHandle] = []
        self._part = _part(model, within)
        self._modules = _matched(self._part, bank.subspace, frozenset(needed))
        self._heads: dict[str, nn.Module | None] = {}

    @property
    def is_alive(self) -> bool:
        """Whether the model still exists."""
        return self._model() is not None

    def check(self, name: str, modules: Iterable[str], heads: Mapping[str, State]) -> None:
        """Refuse a member that the model cannot take.

        Args:
            name: The member.
            modules: Modules that it adapts.
            heads: Its heads.

        Raises:
            SubspaceError: If the model lacks a module, or a head does not fit.
        """
        if self._model() is None:
            return
        lacking = [module for module in modules if module not in self._modules]
        if lacking:
            raise SubspaceError(
                f"{name!r} adapts {some(lacking)}, which the model that the bank is attached to lacks. Use a model of the "
                "base that the subspace was built for."
            )
        for path, state in heads.items():
            module = self._heads[path] if path in self._heads else self._head(path)
            if module is not None:
                check_head(name, path=path, state=state, module=module)

    def hook(self) -> None:
        """Put the hooks for updates in place, and the one that lists logits."""
        for name, module in self._modules.items():
            stacks = self._bank.stacks(name).to(_device(module))
            self.handles.append(module.register_forward_hook(_UpdateHook(self._bank, stacks, name)))
        model = self._model()
        if model is not None:
            self.handles.append(model.register_forward_hook(_ListHook(self._bank)))

    def watch(self, heads: Iterable[str]) -> None:
        """Put the hooks for heads in place that are not there yet.

        Args:
            heads: Paths of heads in the adapters' own model.

        Raises:
            SubspaceError: If several of the model's modules fit a head.
        """
        model = self._model()
        for path in heads:
            if model is None or path in self._heads:
                continue
            module = self._heads[path] = self._head(path)
            if module is None:
                _logger.warning(
                    "Members of the bank have the head %r, which %s lacks: it is not served, only their updates are. Attach the "
                    "bank to a model of the class that they were trained on, to serve the heads too.",
                    path,
                    type(model).__name__,
                )
            else:
                self.handles.append(module.register_forward_hook(_HeadHook(self._bank, path)))

    def _head(self, path: str) -> nn.Module | None:
        """The model's module of that path, in any wrapping; None if it has none."""
        ends = [
            (name, module) for name, module in self._part.named_modules() if name == path or name.endswith(f".{path}")
        ]
        exact = [module for name, module in ends if name == path]
        found = exact or [module for _, module in ends]
        if len(found) > 1:
            raise SubspaceError(
                f"Members have the head {path!r}, and {some(name for name, _ in ends)} of the model fit it alike. Pass "
                "within=, the path of the part that is meant."
            )
        return found[0] if found else None


def _part(model: nn.Module, within: str) -> nn.Module:
    try:
        return model.get_submodule(within)
    except AttributeError as error:
        paths = some((name for name, _ in model.named_children()), limit=8)
        raise SubspaceError(f"within={within!r} is not a path in {type(model).__name__}, which has {paths}.") from error


def _matched(model: nn.Module, subspace: Any, needed: frozenset[str]) -> dict[str, nn.Module]:
    """Module of the subspace to the model's module, of those that have a weight of the right size."""
    shapes = {name: (module_bank.out_features, module_bank.in_features) for name, module_bank in subspace.items()}
    matches = match_modules(model, subspace.modules, shapes=shapes)
    contested = {name: paths for name, paths in matches.contested.items() if name in needed}
    for name, paths in contested.items():
        raise SubspaceError(
            f"{some(paths)} of the model all fit the bank's module {name!r} ({len(contested)} of its {len(needed)} modules "
            'are so). Pass within=, the path of the part that is meant, such as attach(model, within="language_model").'
        )
    found = {name: model.get_submodule(path) for path, name in matches.found.items()}
    found = {name: module for name, module in found.items() if isinstance(getattr(module, "weight", None), Tensor)}
    missing = [name for name in subspace if name in needed and name not in found]
    if missing:
        raise SubspaceError(
            f"{len(missing)} of the bank's {len(needed)} modules, such as {missing[0]!r}, are not in the model "
            f"({type(model).__name__}). Use a model of the base that the subspace was built for."
        )
    sizes = {name: tuple(cast(Tensor, module.weight).shape) for name, module in found.items()}
    for name in [name for name, size in sizes.items() if sorted(size) != sorted(shapes[name])]:
        if name in needed:
            out_features, in_features = shapes[name]
            raise SubspaceError(
                f"{name!r} has a weight of {sizes[name]} in the model and takes {in_features} to "
                f"{out_features} features in the subspace. Use the base that the subspace was built for; convolutions and "
                "packed weights cannot be served."
            )
        del found[name]
    return found


def _device(module: nn.Module) -> Any:
    weight: Any = module.weight
    return weight.device


class _Hook:
    """A forward hook of a bank's; a copy of the model keeps the same bank."""

    def __init__(self, bank: Any):
        self.bank = bank

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return self

    def choice(self) -> Choice | None:
        return _chosen.get().get(id(self.bank))


class _UpdateHook(_Hook):
    """Adds the chosen members' updates to a module's output; does nothing outside of `AdapterBank.use`."""

    def __init__(self, bank: Any, stacks: ModuleStacks, name: str):
        super().__init__(bank)
        self.stacks, self.name = stacks, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        choice = self.choice()
        if choice is None:
            return None
        _check_rows(self.name, args[0], choice)
        if choice.weighted:
            return self._weighted(output, args[0], choice)
        return self.stacks(output, args[0], choice, in_place=owns_output(module, n_hooks=1))

    def _weighted(self, output: Tensor, x: Tensor, choice: Choice) -> Tensor:
        """The output with each row's own weighted sum of updates."""
        for part, weights in choice.weighted:
            update = self.stacks(torch.zeros_like(output), x, part, in_place=False)
            if update is not None:
                output = output + weights.to(output).view(-1, *[1] * (output.ndim - 1)) * update
        return output


class _HeadHook(_Hook):
    """Gives each row the output of its member's head."""

    def __init__(self, bank: Any, path: str):
        super().__init__(bank)
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        choice = self.choice()
        if choice is None:
            return None
        states = [heads.get(self.path) for heads in choice.heads]
        if not any(state is not None for state in states):
            return None
        _check_rows(self.path, args[0], choice)
        if not isinstance(output, Tensor):
            raise SubspaceError(
                f"The head {self.path!r} returns a {type(output).__name__}, and only tensors can be served. Give the "
                "model a head that returns one."
            )
        with choose(self.bank, None):  # the head is called again, with other parameters
            padded, choice.widths = head_outputs(module, x=args[0], output=output, states=states, choice=choice)
        return padded


class _ListHook(_Hook):
    """Turns a model's padded logits into a list where `use(..., logits="list")` asks for it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        choice = self.choice()
        return listed(output, choice) if choice is not None and choice.as_list else None


def _check_rows(name: str, x: Tensor, choice: Choice) -> None:
    if len(x) != len(choice):
        raise SubspaceError(
            f"{name!r} got {len(x)} rows for {len(choice)} members. Name one member per row in bank.use(...), with n_repeats= "
            "for beams; models that flatten sequences into rows cannot be served mixed."
        )
