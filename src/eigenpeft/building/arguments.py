"""The arguments of a builder, checked when it is used."""

from collections.abc import Mapping
from typing import Any

from eigenpeft.building.module_fitter import AUTO
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.bases.fitting import METHODS, WEIGHTINGS


def check_arguments(
    n_components: Any, *, method: Any, weighting: Any, n_pseudo_components: Any, memory_limit: Any
) -> None:
    """Refuse what no build can use.

    Args:
        n_components: As of `SubspaceBuilder`, and so are the others.
        method: What is decomposed.
        weighting: Weighting of the adapters.
        n_pseudo_components: Random directions to add.
        memory_limit: Bytes per module.

    Raises:
        SubspaceError: If one of them is out of range; the message names it.
    """
    if method not in METHODS:
        raise SubspaceError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}.")
    if weighting not in WEIGHTINGS:
        raise SubspaceError(f"weighting={weighting!r} must be one of {', '.join(map(repr, WEIGHTINGS))}.")
    for value in asked_components(n_components):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and value != AUTO and not (isinstance(value, float) and 0 < value <= 1):
            raise SubspaceError(
                f"n_components={value!r} must be a whole number of at least 1, a share between 0 and 1 of the "
                "adapters' squared norms to explain, or 'auto'."
            )
        if METHODS[method].paired and not whole:
            raise SubspaceError(
                f"n_components={value!r} with method={method!r}: pairs of fewer directions are not part of pairs of more, so that "
                "neither a share nor 'auto' can be looked for; pass a whole number."
            )
    if not isinstance(n_pseudo_components, int) or n_pseudo_components < 0:
        raise SubspaceError(f"n_pseudo_components={n_pseudo_components!r} must be a whole number of at least 0.")
    if memory_limit is not None and (not isinstance(memory_limit, int) or memory_limit < 1):
        raise SubspaceError(
            f"memory_limit={memory_limit!r} must be a number of bytes, such as 500_000_000, or None for no limit."
        )


def asked_components(n_components: Any) -> list[int | float | str]:
    """The numbers of components that are asked for, one per pattern.

    Args:
        n_components: As of `SubspaceBuilder`.
    """
    if n_components is None:
        return []
    return list(n_components.values()) if isinstance(n_components, Mapping) else [n_components]
