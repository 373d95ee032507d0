"""The sources of a mixture: members of a store whose frozen cores it weighs, and the weights that it starts with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterMember, AdapterStore, PrincipalSubspace
from eigenpeft.tuners.layers.mixture import MixtureWeights
from eigenpeft.tuners.layers.shared_bases import FrozenBank


@dataclass(frozen=True)
class Mixture:
    """What every layer of one mixture gets its factor from.

    Attributes:
        names: Sources, in the order of the weights.
        members: Their cores; empty where the adapter's own file brings them.
        start: Weights to start with, (T,).
        shared: The weights of all modules; None for weights of each module's own.
    """

    names: tuple[str, ...]
    members: Mapping[str, AdapterMember]
    start: Tensor
    shared: MixtureWeights | None

    def of(self, module: str, frozen_bank: FrozenBank) -> tuple[MixtureWeights, Tensor]:
        """Weights and cores (T, K_out, K_in) of one module; zeros for sources that do not adapt it.

        Args:
            module: Module of the subspace.
            frozen_bank: The components that the layer uses, the first ones of the subspace's.
        """
        n_in, n_out = len(frozen_bank.components_in), len(frozen_bank.components_out)
        cores = torch.zeros(len(self.names), n_out, n_in)
        for row, name in zip(cores, self.names if self.members else (), strict=False):
            core = self.members[name].cores.get(module)
            if core is not None:
                dense = core.dense()[:n_out, :n_in]
                row[: dense.shape[0], : dense.shape[1]] = dense
        return self.shared or MixtureWeights(self.start.clone()), cores


def read_mixture(
    sources: AdapterStore | None,
    *,
    subspace: PrincipalSubspace | None,
    names: Sequence[str] | None = None,
    init_weights: Any = None,
    per_module: bool = False,
    is_read_back: bool = False,
) -> Mixture:
    """The mixture of a store's members, or the empty one that an adapter's own file is about to fill.

    Args:
        sources: The store; None where the file brings the cores.
        subspace: Bases of the adapter; None for components that its own file brings.
        names: Members to weigh, in order; None takes all.
        init_weights: Where the weights start: one number per member, or one for all; None is the mean.
        per_module: Whether each module has weights of its own.
        is_read_back: Whether the adapter has started before, so that it needs no store.

    Raises:
        AdapterConfigError: If it names no sources, sources of other bases, or weights that do not fit them.
        ArtifactError: If a member cannot be read.
    """
    names, members = tuple(names or ()), {}
    if sources is not None:
        _check_bases(sources, subspace)
        names = names or tuple(sources.names)
        unknown = [name for name in names if name not in sources]
        if unknown or not names:
            raise AdapterConfigError(
                f"source_names={list(names)}: the store has {len(sources)} adapters, {some(sources.names) or 'none'}, and not "
                f"{some(unknown) or 'one to weigh'}."
            )
        members = {name: sources[name] for name in names}
    elif not names or not is_read_back:
        raise AdapterConfigError(
            "core='mixture' weighs adapters that exist: pass sources=, an AdapterStore or its folder or Hub id."
        )
    start = _start(init_weights, names)
    return Mixture(names, members, start, None if per_module else MixtureWeights(start.clone()))


def _check_bases(store: AdapterStore, subspace: PrincipalSubspace | None) -> None:
    found = None if subspace is None else subspace.fingerprint
    if found != store.subspace.fingerprint:
        raise AdapterConfigError(
            f"The bases of the sources have fingerprint {store.subspace.fingerprint}, and those of subspace= have {found}. "
            "Leave subspace out, or move the store with AdapterStore.rebase."
        )


def _start(given: Any, names: Sequence[str]) -> Tensor:
    if given is None:
        return torch.full((len(names),), 1 / len(names))
    if isinstance(given, int | float):
        return torch.full((len(names),), float(given))
    if len(given) != len(names):
        raise AdapterConfigError(
            f"init_weights has {len(given)} numbers for {len(names)} sources, {some(names)}; pass one for each."
        )
    return torch.tensor([float(each) for each in given])
