"""Coefficients to start from, taken from an existing adapter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.factored import truncate
from eigenpeft.subspace import Coefficients, CoefficientStore, PrincipalSubspace


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies in the subspace, by the subspace's module names.

    Attributes:
        source: As the user named it.
        modules: Coefficients by module; modules that the adapter does not have start as usual.
    """

    source: str
    modules: dict[str, Coefficients]

    def coefficients(
        self, module: str, *, start: tuple[Tensor | None, Tensor], core: str, scaling: float
    ) -> tuple[Tensor | None, Tensor]:
        """Coefficients of a module in the form of a core, the adapter's own scaling divided by the new one.

        Args:
            module: Module of the subspace.
            start: The usual start, which gives the shapes and fills what the adapter's rank leaves free.
            core: "low_rank" (optimal truncation when the adapter's rank is larger), "mixer" or "diagonal".
            scaling: `s` of the new adapter.
        """
        if module not in self.modules:
            return start
        start_in, start_out = start
        n_components = len(start_out)
        left = self.modules[module].coefficients_out[:n_components].float() / scaling
        right = self.modules[module].coefficients_in[:, :n_components].float()
        if core == "mixer":
            return None, left @ right
        if core == "diagonal":
            return None, (left * right.mT).sum(dim=1)
        assert start_in is not None  # the low-rank core has both sides
        rank = min(len(start_in), len(right))
        left, right = truncate(left, right, rank=rank)
        # What the rank leaves free adds nothing: one side of it is zero, that which a start has at zero (embeddings' A).
        coefficients_in = start_in.clone()
        coefficients_out = torch.zeros_like(start_out) if start_in.any() else start_out.clone()
        coefficients_in[:rank], coefficients_out[:, :rank] = right, left
        return coefficients_in, coefficients_out


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
        store = CoefficientStore.from_pretrained(place)
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
