"""Cores to start from, taken from an existing adapter."""

from collections.abc import Mapping
from dataclasses import dataclass

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterStore, Core, PrincipalSubspace
from eigenpeft.subspace.cores import CoreKind, Parts


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies in the subspace, by the subspace's module names.

    Attributes:
        source: As the user named it.
        modules: The adapter's core by module; modules that the adapter does not have start as usual.
    """

    source: str
    modules: Mapping[str, Core]

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
        AdapterConfigError: If the store has other bases, or the adapter has none of the subspace's modules.
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
        return WarmStart(source, dict(store[member]))
    with AdapterCollection.from_pretrained([source], embeddings=bool(subspace.info.embeddings)) as collection:
        found = {module: subspace.find(module) for module in collection.modules}
        read = {name: collection.factors(module)[0] for module, name in found.items() if name is not None}
        if not read:
            raise AdapterConfigError(
                f"init_from={source!r}: none of its modules, such as {collection.modules[0]!r}, is in the subspace."
            )
        return WarmStart(source, subspace.project({name: (value.lora_B, value.lora_A) for name, value in read.items()}))
