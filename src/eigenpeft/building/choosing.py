"""The number of components of one module from its held-out curve: `n_components="auto"`."""

from collections.abc import Hashable, Sequence

from eigenpeft.collection.diagnosis import Diagnosis, independent_groups
from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.linalg.bases.fitting import Method
from eigenpeft.linalg.bases.stacking import ManyFactors, Weighting, stack_factors
from eigenpeft.linalg.scores.leave_one_out import choose_n_components, held_out_curves
from eigenpeft.linalg.scores.nulls import chance_curve

# More are never chosen: beyond, storing the adapters as they are is the better plan.
MOST_COMPONENTS = 64
_FEWEST_ADAPTERS = 3


def automatic_n_components(
    factors: ManyFactors, *, groups: Sequence[Hashable], method: Method, weighting: Weighting
) -> int:
    """K where the share of a left-out adapter, explained by the others beyond chance, stops growing.

    Args:
        factors: `(lora_B (m, r_i), lora_A (r_i, n))` of each adapter of one module, the scaling folded into lora_B.
        groups: A label for each adapter; those of one label are left out together, so that none is measured
            against its relatives.
        method: How the components will be fitted; "eigenlorax" takes the curve of "balanced".
        weighting: As for the fit.

    Returns:
        1 to 64.

    Raises:
        ValueError: If fewer than three adapters have an update, or these are of fewer than three groups.
    """
    rows = "moments" if method in ("hosvd", "hooi") else "balanced"
    stacks = stack_factors(factors, rows=rows, weighting=weighting)
    count = len(stacks.sizes)
    if count < _FEWEST_ADAPTERS:
        raise ValueError(
            f"n_components='auto' leaves out one adapter at a time and needs {_FEWEST_ADAPTERS} with an update, but "
            f"only {count} have one; pass a number."
        )
    labels = [label for label, norm in zip(groups, stacks.norms, strict=True) if norm > 0]
    if len(set(labels)) < _FEWEST_ADAPTERS:
        raise ValueError(
            f"n_components='auto' asks what adapters hold of one that is left out, and needs {_FEWEST_ADAPTERS} that came "
            f"about independently, but the {count} here are of {len(set(labels))} random starts or runs; pass a number."
        )
    most = min(MOST_COMPONENTS, stacks.rows_in.shape[1], stacks.rows_out.shape[1])
    share = held_out_curves(stacks, n_components=most, groups=labels).both.mean(dim=0)
    chance = chance_curve(most, stacks.rows_out.shape[1], stacks.rows_in.shape[1])
    return choose_n_components(share, chance=chance)


def independent_starts(collection: AdapterCollection) -> dict[str, str]:
    """Adapter to a label, the same for those of one random start or run, as a few modules show.

    Args:
        collection: The adapters that are compared.

    Raises:
        CollectionError: If a tensor cannot be read or is not finite.
    """
    diagnosis = Diagnosis()
    for module in collection.modules:
        if diagnosis.compares(collection.names_with(module)):
            diagnosis.compare(collection.each_factors(module))
    return independent_groups(collection.names, diagnosis.findings())
