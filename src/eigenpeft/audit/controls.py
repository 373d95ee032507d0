"""The source adapter that is most like a trained one: what copying would do, without any subspace."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, inner_product
from eigenpeft.linalg.scores.update_cosines import update_cosines


def nearest_adapter(
    collection: AdapterCollection, *, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[str, float]:
    """The source adapter most like a given one: what copying would do without any subspace.

    Likeness is the cosine over all modules, `eigenpeft.linalg.scores.update_cosines`.

    Args:
        collection: Where to look.
        factors: `(lora_B (out_features, r), lora_A (r, in_features))` by module, scaling folded into lora_B.

    Returns:
        Name and cosine between the ΔW of all common modules taken together. Modules that a source adapter does not
        have count as zero there.

    Raises:
        SubspaceError: If there is no common module, or the given update or all of the collection's are zero.
        CollectionError: If an adapter cannot be read any more, or holds numbers that are not finite.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> module = collection.modules[0]
        >>> read = next(one for one in collection.each_factors(module) if one.adapter == "cr")
        >>> nearest_adapter(collection, factors={module: (read.lora_B, read.lora_A)})[0]
        'cr'
    """
    common = [module for module in collection.modules if module in factors]
    own = [float(frobenius_norm(*factors[module])) ** 2 for module in common]
    if not sum(own) > 0:
        raise SubspaceError(
            f"The given adapter has no update in any module of the collection ({len(common)} of its {len(factors)} "
            "modules are known there); compare adapters of the same base model that are trained."
        )
    places = {name: place for place, name in enumerate(collection.names)}
    inner, squares = torch.zeros(2, len(common), len(places), dtype=torch.float64)
    for i, module in enumerate(common):
        given_B, given_A = factors[module]
        for read in collection.factors(module):
            place = places[read.adapter]
            inner[i, place] = inner_product(read.lora_B, read.lora_A, other_B=given_B, other_A=given_A)
            squares[i, place] = frobenius_norm(read.lora_B, read.lora_A) ** 2
    of_given = torch.tensor(own, dtype=torch.float64)[:, None].expand_as(squares)
    found = update_cosines(inner, squares, of_given).tolist()
    cosines = {name: value for name, value in zip(places, found, strict=True) if not math.isnan(value)}
    if not cosines:
        raise SubspaceError(
            f"All {len(collection)} adapters of the collection are zero in the {len(common)} common modules, so none of them is "
            "the nearest; pass a collection that has trained adapters."
        )
    name = max(cosines, key=lambda each: cosines[each])
    return name, cosines[name]
