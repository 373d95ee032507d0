"""Patterns in an adapter's file, replaced by the names that they mean before PEFT matches them without a bound."""

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.formats.patterns import PatternTable, is_plain, whole_matches
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.target_names import excluding, strays

_ALL_LINEAR = "all-linear"  # PEFT's own word, no pattern
_NAMES_ONLY = ("layers_pattern", "modules_to_save")
_VALUES = ("rank_pattern", "alpha_pattern")
FIELDS = ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", *_NAMES_ONLY, *_VALUES)
"""Fields of PEFT's configurations that say which modules are meant."""


def settle_patterns(said: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Say by name what the configuration in an adapter's file says by regular expressions.

    PEFT matches `target_modules`, `exclude_modules`, `rank_pattern`, `alpha_pattern`, `layers_pattern` and `modules_to_save` with
    the standard library, in which an expression such as "(a+)+" takes 2^n steps. Here they are matched once, by a library that
    stops at a time limit, and what they mean in the model takes their place. Plain names stay as they are.

    Args:
        said: What a file says, by the name of the field (`FIELDS`); None where the method has no such field.
        model: Model to adapt.

    Returns:
        The fields that have to be said otherwise, by name.

    Raises:
        AdapterConfigError: If a pattern is not a regular expression, takes too long, or means no module; or one stands where
            PEFT takes names alone (`layers_pattern`, `modules_to_save`).
    """
    for field in _NAMES_ONLY:
        value = said.get(field) or ()
        for name in (value,) if isinstance(value, str) else value:
            if not is_plain(str(name)):
                raise AdapterConfigError(
                    f"{field} in the adapter's file has {str(name)[:80]!r}, which must be a plain name: letters, digits, '_', "
                    "'-' and dots. Get a fresh copy of the adapter, or write the name."
                )
    try:
        settled = _settled_targets(said, model)
        for field in _VALUES:
            settled |= _settled_values(said, field, model)
        return settled
    except ValueError as error:
        if isinstance(error, AdapterConfigError):
            raise
        raise AdapterConfigError(f"The adapter's file has {error}.") from error


def _settled_targets(said: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    targets: Any = said.get("target_modules")
    excluded: Any = said.get("exclude_modules")
    is_pattern = isinstance(targets, str) and targets != _ALL_LINEAR
    if targets is None or not (is_pattern or isinstance(excluded, str)):
        return {}
    names = _module_names(model)
    if targets == _ALL_LINEAR:
        return {"exclude_modules": whole_matches(excluded, names)}
    own: Any = set(whole_matches(targets, names)) if is_pattern else targets
    listed = None if isinstance(excluded, str) else excluded
    rule = SimpleNamespace(**{**dict.fromkeys(FIELDS), **said, "target_modules": own, "exclude_modules": listed})
    wanted = {name for name in names if check_target_module_exists(rule, name)}
    if is_pattern:
        wanted &= own  # and none whose name only ends so
    if isinstance(excluded, str):
        wanted -= set(whole_matches(excluded, names))
    if not wanted:
        raise AdapterConfigError(
            f"target_modules={str(targets)[:80]!r} with exclude_modules={str(excluded)[:80]!r} means no module of the model, "
            f"whose modules are such as {', '.join(map(repr, names[-3:]))}. Was the adapter trained on another model?"
        )
    return {"target_modules": wanted, "exclude_modules": excluding(listed, strays(model, wanted))}


def _settled_values(said: Mapping[str, Any], field: str, model: nn.Module) -> dict[str, Any]:
    patterns = said.get(field) or {}
    if all(is_plain(pattern) for pattern in patterns):
        return {}
    table = PatternTable({pattern: (pattern, value) for pattern, value in patterns.items()})
    parameters = (name for name, _ in model.named_parameters()) if said.get("target_parameters") else ()
    found = {
        name: table.value(name, default=(None, None)) for name in (*_module_names(model), *map(_own_name, parameters))
    }
    return {field: {_exactly(name): value for name, (pattern, value) in found.items() if pattern is not None}}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _module_names(model: nn.Module) -> list[str]:
    """The base model's own names of its modules, without what adapters have put into them."""
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return _unique(_own_name(name) for name in modules if name and not name.startswith(inside or ("\0",)))


def _own_name(name: str) -> str:
    return without_wrappers(name).replace(".base_layer", "")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
