"""A merge as a YAML file: adapters with weights, rule, rank, multiplier and options."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eigenpeft.errors import AdapterConfigError

_FIELDS = ("adapters", "rule", "rank", "scale", "calibrate", "seed", "options")
_EXAMPLE = "adapters: [{path: adapters/sst2, weight: 1.0}, {path: adapters/mr, weight: -0.3}]"


@dataclass(frozen=True)
class MergeRecipe:
    """What a recipe says; the names are those of `merge`.

    Attributes:
        adapters: Folders or Hub ids.
        weights: One per adapter.
        settings: Further arguments of `merge` that the file names.
        options: Options of the rule.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def read_recipe(path: str | Path) -> MergeRecipe:
    """Read a recipe; folders in it are relative to the file.

    Args:
        path: YAML file with `adapters` (a list of `path` and `weight`, 1 where it is left out), and any of `rule`, `rank`,
            `scale`, `calibrate`, `seed` and `options`.

    Raises:
        AdapterConfigError: If it cannot be read or says something else.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AdapterConfigError(f"The recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), list) or not content["adapters"]:
        raise AdapterConfigError(f"The recipe {str(path)!r} lists no adapters; write for example '{_EXAMPLE}'.")
    foreign = sorted(str(name) for name in content if name not in _FIELDS)
    if foreign:
        raise AdapterConfigError(
            f"The recipe {str(path)!r} has {', '.join(map(repr, foreign))}, which means nothing here; it may have "
            f"{', '.join(_FIELDS)}."
        )
    places, weights = [], []
    for entry in content["adapters"]:
        entry = {"path": entry} if isinstance(entry, str) else entry
        fits = isinstance(entry, dict) and isinstance(entry.get("path"), str) and not set(entry) - {"path", "weight"}
        weight = entry.get("weight", 1.0) if fits else None
        if not fits or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise AdapterConfigError(
                f"The recipe {str(path)!r} has the adapter {entry!r}; write a path, or a path and a weight that is a number: "
                f"'{_EXAMPLE}'."
            )
        local = path.parent / entry["path"]
        places.append(str(local) if local.exists() else entry["path"])
        weights.append(float(weight))
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise AdapterConfigError(f"The recipe {str(path)!r} has options={options!r}; write names and values.")
    settings = {name: content[name] for name in ("rule", "rank", "scale", "calibrate", "seed") if name in content}
    return MergeRecipe(tuple(places), tuple(weights), settings, {str(name): value for name, value in options.items()})
