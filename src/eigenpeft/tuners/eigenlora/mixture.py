"""The sources of a mixture: members of a store whose frozen cores it weighs, and the weights that it starts with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterMember, AdapterStore, PrincipalSubspace
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
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


def read_mixture(config: EigenLoraConfig, subspace: PrincipalSubspace | None) -> Mixture:
    """The mixture that a configuration names; into the configuration go the names of its sources.

    Args:
        config: Configuration of the adapter.
        subspace: Bases of the adapter; None for components that its own file brings.

    Raises:
        AdapterConfigError: If it names no sources, sources of other bases, or weights that do not fit them.
    """
    store = config.open_sources()
    names, members = tuple(config.source_names or ()), {}
    if store is not None:
        _check_bases(store, subspace)
        names = names or store.names
        unknown = [name for name in names if name not in store]
        if unknown or not names:
            raise AdapterConfigError(
                f"source_names={list(names)}: the store has {len(store)} adapters, {some(store.names) or 'none'}, and not "
                f"{some(unknown) or 'one to weigh'}."
            )
        members = {name: store[name] for name in names}
        config.source_names = list(names)
    elif not names or not config.is_from_file and not config.has_started:
        raise AdapterConfigError(
            "core='mixture' weighs adapters that exist: pass sources=, an AdapterStore or its folder or Hub id."
        )
    start = _start(config.init_weights, names)
    return Mixture(names, members, start, MixtureWeights(start.clone()) if config.weights == "adapter" else None)


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
