"""The source adapter that is most like a trained one: what copying would do, without any subspace."""

from collections.abc import Mapping

from torch import Tensor

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, inner_product


def nearest_adapter(collection: AdapterCollection, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, float]:
    """The source adapter most like a given one: what copying would do without any subspace.

    Likeness is the cosine `⟨ΔW, ΔW_t⟩ / (‖ΔW‖ ‖ΔW_t‖)`, sums over all modules.

    Args:
        collection: Where to look.
        factors: `(lora_B (out_features, r), lora_A (r, in_features))` by module, scaling folded into lora_B.

    Returns:
        Name and cosine between the ΔW of all common modules taken together. Modules that a source adapter does not
        have count as zero there.

    Raises:
        SubspaceError: If there is no common module, or the given update is zero.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> module = collection.modules[0]
        >>> read = next(one for one in collection.each_factors(module) if one.adapter == "cr")
        >>> nearest_adapter(collection, {module: (read.lora_B, read.lora_A)})[0]
        'cr'
    """
    common = [module for module in collection.modules if module in factors]
    own = sum(float(frobenius_norm(*factors[module])) ** 2 for module in common)
    if not own > 0:
        raise SubspaceError(
            f"The given adapter has no update in any module of the collection ({len(common)} of its {len(factors)} "
            "modules are known there); compare adapters of the same base model that are trained."
        )
    inner, squares = dict.fromkeys(collection.names, 0.0), dict.fromkeys(collection.names, 0.0)
    for module in common:
        for read in collection.factors(module):
            inner[read.adapter] += float(inner_product(read.lora_B, read.lora_A, *factors[module]))
            squares[read.adapter] += float(frobenius_norm(read.lora_B, read.lora_A)) ** 2
    cosines = {name: inner[name] / (own * square) ** 0.5 for name, square in squares.items() if square > 0}
    if not cosines:
        raise SubspaceError(
            f"All {len(collection)} adapters of the collection are zero in the {len(common)} common modules, so none of them is "
            "the nearest; pass a collection that has trained adapters."
        )
    name = max(cosines, key=lambda each: cosines[each])
    return name, cosines[name]
