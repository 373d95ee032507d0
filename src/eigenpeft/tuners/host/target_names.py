"""Targets named in full, which PEFT takes for the ends of longer names too."""

from collections.abc import Collection

from peft import LoraConfig
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


def exclude(config: LoraConfig, names: Collection[str]) -> None:
    """Leave modules out of what PEFT targets, beside those that the configuration leaves out already.

    Args:
        config: Configuration of an adapter that is about to be injected.
        names: Modules in full.

    Raises:
        AdapterConfigError: If `exclude_modules` is a pattern, to which nothing can be added.
    """
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        raise AdapterConfigError(
            f"{some(list(names))} would be adapted too, whose names end as the subspace's modules' do, and "
            f"exclude_modules={config.exclude_modules!r} is a pattern. Pass exclude_modules as a list."
        )
    config.exclude_modules = sorted({*(config.exclude_modules or ()), *names})
