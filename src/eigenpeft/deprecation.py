"""Old names that still work for one minor version, with a warning that names the new one."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def moved_names(module: str, new_places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds names which have moved or have a new name.

    Args:
        module: Name of the module that had the old names.
        new_places: Old name to the dotted place of the object now.

    Returns:
        The function to assign to `__getattr__`. It warns with `DeprecationWarning` and names the new place.

    Examples:
        >>> find = moved_names("old.place", {"sqroot": "math.sqrt"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     find("sqroot")(4.0)
        2.0
        >>> print(caught[0].message)
        old.place.sqroot is deprecated and goes away in the next minor version; use math.sqrt.
    """

    def find(name: str) -> Any:
        if name not in new_places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = new_places[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is deprecated and goes away in the next minor version; use {new_places[name]}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(place), attribute)

    return find
