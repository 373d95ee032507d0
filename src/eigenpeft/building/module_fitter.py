"""Fitting one module: from its adapters' factors to its subspace, at once, in chunks, or onto what was fitted before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from eigenpeft.building.choosing import automatic_n_components
from eigenpeft.building.chunks import bytes_at_once, chunk_adapters
from eigenpeft.building.work_folder import FittedModule
from eigenpeft.collection.reader import AdapterCollection, AdapterFactors
from eigenpeft.linalg.bases.chunked import fit_chunks
from eigenpeft.linalg.bases.fitting import (
    MERGEABLE,
    FittedBases,
    Method,
    TooFewDirectionsError,
    Weighting,
    explained_share_curve,
    fit_bases,
    stack_rows,
)
from eigenpeft.linalg.bases.incremental import merge_components
from eigenpeft.linalg.bases.stacking import FactorStream
from eigenpeft.linalg.orthogonal import random_complement
from eigenpeft.linalg.shares import added_shares
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.seeding import seeded_generator

# Components counted on where a share is asked for, to tell whether a module's adapters fit into the memory limit.
_SHARE_GUESS = 64
AUTO = "auto"
# EigenLoRAx's (arXiv 2502.04700); where nobody asks for a number, a module that has fewer directions keeps all that it has.
DEFAULT_COMPONENTS = 32


@dataclass(frozen=True)
class ModuleFitter:
    """The settings of a `SubspaceBuilder`, checked, and what they mean for one module.

    Attributes:
        n_components: As for `SubspaceBuilder`, as are the other settings.
        method: What is decomposed.
        weighting: Weighting of the adapters.
        n_pseudo_components: Random directions to add.
        seed: Seed of those directions, and of the solver's start.
        tol: Tolerance of the solver.
        memory_limit: Bytes that one module may take.
        groups: Adapter to a label, the same for those of one random start or run; asked for by "auto".
    """

    n_components: int | float | str | Mapping[str, int | float | str] | None
    method: Method
    weighting: Weighting
    n_pseudo_components: int
    seed: int
    tol: float
    memory_limit: int | None
    groups: Mapping[str, str] = field(default_factory=dict)

    def fit(self, module: str, collection: AdapterCollection) -> FittedModule:
        """Fit one module to all adapters that have it.

        Args:
            module: Name from `collection.modules`.
            collection: Read one adapter after another.

        Raises:
            ValueError: If the module cannot be fitted as asked; the message leaves its name to the caller.
            CollectionError: If a tensor cannot be read or is not finite.
            KeyError: If no adapter adapts the module.
        """
        n_components = self._n_components_of(module)
        if n_components is None:
            n_components = min(DEFAULT_COMPONENTS, sum(collection.ranks(module).values()), *collection.shapes[module])
        chunks = self._chunks(module, collection, n_components)
        if chunks is not None:
            streamed = fit_chunks(
                lambda: (_pairs(collection.factors(module, names=names)) for names in chunks),
                n_components=int(n_components),
                method=self.method,  # pyright: ignore[reportArgumentType] (_chunks has seen to it)
                weighting=self.weighting,
            )
            bound = max(streamed.missed_bound_in, streamed.missed_bound_out)
            bank = self._with_pseudo_components(module, streamed.bases)
            return FittedModule(bank, norms=streamed.bases.norms, missed_bound=bound)
        # Read while they are stacked: all factors and all rows together would take twice the memory.
        stream = FactorStream(
            n_rows=sum(collection.ranks(module).values()), read=lambda: _each_pair(collection, module)
        )
        if isinstance(n_components, str):
            labels = [self.groups[name] for name in collection.names_with(module)]
            n_components = automatic_n_components(stream, groups=labels, method=self.method, weighting=self.weighting)
        try:
            fitted = self._fitted(stream, n_components, module)
        except TooFewDirectionsError as error:
            if self.n_components is not None or error.rank < 1:
                raise
            fitted = self._fitted(stream, error.rank, module)
        return FittedModule(self._with_pseudo_components(module, fitted), norms=fitted.norms)

    def _fitted(self, stream: FactorStream, n_components: int | float, module: str) -> FittedBases:
        return fit_bases(
            stream,
            n_components=n_components,
            method=self.method,
            weighting=self.weighting,
            tol=self.tol,
            generator=seeded_generator(self.seed, module, "solver"),
        )

    def update(
        self,
        module: str,
        bank: ModuleSubspace,
        factors: Sequence[AdapterFactors],
        *,
        measured_on: Sequence[AdapterFactors],
    ) -> ModuleSubspace:
        """Merge more adapters into the bank of a module; the number of components stays as it is.

        Args:
            module: Name of the module in the subspace.
            bank: The bank as it was fitted before.
            factors: Factors of the new adapters.
            measured_on: Factors of the adapters that the explained shares are of.

        Raises:
            ValueError: If shapes differ, or the sides have different numbers of components.
        """
        if bank.n_components_in != bank.n_components_out:
            raise ValueError(
                f"its sides have {bank.n_components_in} and {bank.n_components_out} components, and more adapters are "
                "merged into bases with one number for both; build it again with all adapters"
            )
        n_principal = bank.n_components - bank.n_pseudo_components
        merged = [
            merge_components(components[:n_principal], singular_values=values, rows=rows, n_components=n_principal)
            for components, values, rows in zip(
                (bank.components_in, bank.components_out),
                (bank.singular_values_in, bank.singular_values_out),
                stack_rows(_pairs(factors), method=self.method, weighting=self.weighting),
                strict=True,
            )
        ]
        curve = explained_share_curve(
            _pairs(measured_on),
            components_in=merged[0].components,
            components_out=merged[1].components,
            weighting=self.weighting,
        )
        fitted = FittedBases(
            components_in=merged[0].components,
            components_out=merged[1].components,
            singular_values_in=merged[0].singular_values,
            singular_values_out=merged[1].singular_values,
            explained_variance_ratio=added_shares(curve),
            norms=(),
        )
        return self._with_pseudo_components(module, fitted)

    def _chunks(
        self, module: str, collection: AdapterCollection, n_components: int | float | str
    ) -> list[list[str]] | None:
        ranks, shape = collection.ranks(module), collection.shapes[module]
        most = n_components if isinstance(n_components, int) else _SHARE_GUESS
        if (
            self.memory_limit is None
            or bytes_at_once(sum(ranks.values()), shape, n_components=most) <= self.memory_limit
        ):
            return None
        if self.method not in MERGEABLE or not isinstance(n_components, int):
            raise ValueError(
                f"its adapters do not fit into memory_limit={self.memory_limit} bytes together, and a single pass needs "
                f"method {' or '.join(map(repr, MERGEABLE))} and a whole number of components, not "
                f"method={self.method!r} and n_components={n_components!r}; raise the limit or change these"
            )
        return chunk_adapters(ranks, shape, n_components=most, memory_limit=self.memory_limit)

    def _n_components_of(self, module: str) -> int | float | str | None:
        if not isinstance(self.n_components, Mapping):
            return self.n_components
        for pattern, value in self.n_components.items():
            if fnmatchcase(module, pattern):
                return value
        raise ValueError(
            f"no pattern of n_components fits it; the patterns are {list(self.n_components)}. Add one, such as '*'."
        )

    def _with_pseudo_components(self, module: str, fitted: FittedBases) -> ModuleSubspace:
        sides = {"in": fitted.components_in, "out": fitted.components_out}
        if self.n_pseudo_components:
            for side, components in sides.items():
                extra = random_complement(
                    components,
                    n_pseudo_components=self.n_pseudo_components,
                    generator=seeded_generator(self.seed, module, side),
                )
                sides[side] = torch.cat([components, extra.to(components.dtype)])
        largest = torch.cat([fitted.singular_values_in, fitted.singular_values_out]).max()
        if not largest.float().isfinite():
            raise ValueError(
                f"its singular values reach {float(largest):.3g}, more than a file's float32 holds: an adapter diverged; leave "
                "it out, or pass weighting='equal'."
            )
        return ModuleSubspace(
            components_in=sides["in"].float(),
            components_out=sides["out"].float(),
            singular_values_in=fitted.singular_values_in.float(),
            singular_values_out=fitted.singular_values_out.float(),
            explained_variance_ratio=fitted.explained_variance_ratio.float(),
            paired=fitted.paired,
        )


def _pairs(factors: Sequence[AdapterFactors]) -> list[tuple[Tensor, Tensor]]:
    return [(adapter.lora_B, adapter.lora_A) for adapter in factors]


def _each_pair(collection: AdapterCollection, module: str) -> Iterator[tuple[Tensor, Tensor]]:
    for adapter in collection.each_factors(module):
        yield adapter.lora_B, adapter.lora_A
