"""Names that are imported when they are first used, and an action that waits for a package's import."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy_names(module: str, places: Mapping[str, str], *, otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` that imports a public name when it is first used, so that importing the module is cheap.

    Args:
        module: Name of the module.
        places: Public name to the module that defines it.
        otherwise: Asked for every other name; raises AttributeError.

    Examples:
        >>> def nothing_else(name):
        ...     raise AttributeError(name)
        >>> lazy_names("doctest", {"sqrt": "math"}, otherwise=nothing_else)("sqrt")(4.0)
        2.0
    """

    def find(name: str) -> Any:
        if name not in places:
            return otherwise(name)
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules.get(module, ModuleType(module)), name, value)
        return value

    return find


def after_import(package: str, action: Callable[[], Any]) -> None:
    """Run an action once a package has been imported: at once if it is there already, else right after its import.

    Args:
        package: Name of a top-level package.
        action: Takes nothing. It may import the package.
    """
    if package in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(package, action))


class _Waiting(MetaPathFinder):
    """Finds one package as the other finders do, with an action behind its loading."""

    def __init__(self, package: str, action: Callable[[], Any]):
        self.package, self.action = package, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.action)
        return spec


class _Then(Loader):
    """Loads a module with its own loader, gives it that loader back, and runs the action."""

    def __init__(self, loader: Any, action: Callable[[], Any]):
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()
