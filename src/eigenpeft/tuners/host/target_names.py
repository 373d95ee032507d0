"""Targets named in full, which PEFT takes for the ends of longer names too."""

from collections.abc import Collection

from torch import nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError


def strays(model: nn.Module, targets: Collection[str]) -> list[str]:
    """The modules that PEFT would adapt besides the targets, because their names end in a target's.

    Args:
        model: Model of the targets, with or without adapters, compiled or not.
        targets: Names of modules in full.

    Example:
        >>> towers = nn.ModuleDict({"q": nn.Linear(2, 2), "vision": nn.ModuleDict({"q": nn.Linear(2, 2)})})
        >>> strays(towers, {"q"})
        ['vision.q']
    """
    targets = set(targets)
    names = dict.fromkeys(without_wrappers(name).removesuffix(".base_layer") for name, _ in model.named_modules())
    return [name for name in names if name not in targets and _ends_in_one(name, targets)]


def _ends_in_one(name: str, targets: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[start:]) in targets for start in range(1, len(parts)))


def excluding(excluded: list[str] | str | None, names: Collection[str]) -> list[str] | str | None:
    """`exclude_modules` with further modules, which PEFT would otherwise adapt.

    Args:
        excluded: `exclude_modules` of a configuration.
        names: Modules in full; without any, `excluded` stays as it is.

    Raises:
        AdapterConfigError: If `excluded` is a pattern, to which nothing can be added.

    Example:
        >>> excluding(["lm_head"], ["vision.q"])
        ['lm_head', 'vision.q']
    """
    if not names:
        return excluded
    if isinstance(excluded, str):
        raise AdapterConfigError(
            f"{some(list(names))} would be adapted too, whose names end as the subspace's modules' do, and "
            f"exclude_modules={excluded!r} is a pattern. Pass exclude_modules as a list."
        )
    return sorted({*(excluded or ()), *names})
