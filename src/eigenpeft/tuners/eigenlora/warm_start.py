"""Cores to start from, taken from an existing adapter."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterStore, Core, PrincipalSubspace
from eigenpeft.subspace.cores import CoreKind, Parts


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies in the subspace, by the subspace's module names.

    Attributes:
        source: As the user named it.
        modules: The adapter's core by module; modules that the adapter does not have start as usual.
        left_out: Modules of the adapter that the subspace has no bases for.
        kept_aside: What the adapter trained besides updates of weights, by the keys of its file: heads, biases, tokens.
    """

    source: str
    modules: Mapping[str, Core]
    left_out: tuple[str, ...] = ()
    kept_aside: tuple[str, ...] = ()

    def report(self, placed: Iterable[str]) -> None:
        """Warn of everything in the adapter that the new one does not start from, by name.

        Args:
            placed: Modules of the subspace that the new adapter adapts.
        """
        placed = set(placed)
        untargeted = [module for module in self.modules if module not in placed]
        parts = (
            (self.left_out, "modules that are not in the subspace"),
            (untargeted, "modules that the new adapter does not adapt"),
            (self.kept_aside, "tensors that are no updates of weights (heads, biases or tokens)"),
        )
        lost = [f"{len(names)} {what}: {some(names)}" for names, what in parts if names]
        if lost:
            warnings.warn(
                f"init_from={self.source!r}: the new adapter starts without {'; '.join(lost)}.",
                stacklevel=2,
            )

    def parts(self, module: str, *, start: Parts, core: CoreKind, scaling: float) -> Parts:
        """The core of a module in the form of a kind, the adapter's own scaling divided by the new one.

        Args:
            module: Module of the subspace.
            start: The usual start, which gives the shapes and fills what the adapter's rank leaves free.
            core: The kind; a factored one gets the optimal truncation when the adapter's rank is larger.
            scaling: `s` of the new adapter.
        """
        if module not in self.modules:
            return start
        n_in, n_out, free = core.sizes(start)
        left, right = self.modules[module].factors()
        left, right = left[:n_out].float() / scaling, right[:, :n_in].float()
        rank = min(free, len(right))
        fitted = core.from_factors(left, right, rank)
        if not core.is_factored:
            return fitted
        # What the rank leaves free adds nothing: one side of it is zero, that which a start has at zero (embeddings' A).
        inside, outside = start["coefficients_in"].clone(), start["coefficients_out"].clone()
        if inside.any():
            outside.zero_()
        inside[:rank], outside[:, :rank] = fitted["coefficients_in"], fitted["coefficients_out"]
        return {"coefficients_in": inside, "coefficients_out": outside}


def read_warm_start(source: str, subspace: PrincipalSubspace) -> WarmStart:
    """Read `'<store>#<member>'`, or project the LoRA adapter at a folder or Hub id onto the subspace.

    Args:
        source: Where to start from.
        subspace: Bases of the new adapter.

    Raises:
        AdapterConfigError: If the store has other bases, the adapter has none of the subspace's modules, or two that fit one.
        CollectionError: If the adapter cannot be read.
    """
    if "#" in source:
        place, _, member = source.partition("#")
        store = AdapterStore.from_pretrained(place)
        if store.subspace.fingerprint != subspace.fingerprint:
            raise AdapterConfigError(
                f"init_from={source!r}: that store's bases have fingerprint {store.subspace.fingerprint}, the adapter's "
                f"have {subspace.fingerprint}. Pass the adapter itself to have it projected."
            )
        stored = store[member]
        return WarmStart(source, dict(stored), kept_aside=tuple(stored.kept))
    with AdapterCollection.from_pretrained([source], embeddings=bool(subspace.info.embeddings)) as collection:
        by_module: dict[str, str] = {}
        left_out: list[str] = []
        for module in collection.modules:
            name = subspace.find(module)
            if name is None:
                left_out.append(module)
            elif by_module.setdefault(name, module) != module:
                raise AdapterConfigError(
                    f"init_from={source!r}: its modules {by_module[name]!r} and {module!r} both fit the subspace's one module "
                    f"{name!r}. Take a subspace that has them apart."
                )
        if not by_module:
            raise AdapterConfigError(
                f"init_from={source!r}: none of its modules, such as {collection.modules[0]!r}, is in the subspace."
            )
        read = {name: collection.factors(module)[0] for name, module in by_module.items()}
        cores = subspace.project({name: (value.lora_B, value.lora_A) for name, value in read.items()})
        return WarmStart(source, cores, tuple(left_out), collection[collection.names[0]].kept_aside)
