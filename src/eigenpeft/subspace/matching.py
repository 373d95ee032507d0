"""Which modules of a model are a subspace's: one function with one report, by the names that PEFT would load them under."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from eigenpeft.collection.alignment import shorter_ends

try:  # transformers 5 knows the names that its models had before
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
except ImportError:
    get_model_conversion_mapping = None


@dataclass(frozen=True)
class ModuleMatches:
    """What a subspace and a model have in common.

    Attributes:
        found: Module of the model to module of the subspace, each at most once, in the model's order.
        missing: Modules of the subspace that the model does not have.
        contested: Modules of the subspace that fit several modules of the model alike, and these; none of them is in
            `found`.
    """

    found: Mapping[str, str]
    missing: tuple[str, ...]
    contested: Mapping[str, tuple[str, ...]]


def match_modules(
    model: nn.Module, names: Iterable[str], *, shapes: Mapping[str, tuple[int, int]] | None = None
) -> ModuleMatches:
    """Find the modules that names from adapter files mean in a model.

    A name means, in this order: the module of that name; the module that transformers gives that name today (old spellings
    of vision-language models, as PEFT reads LoRA files of them); or the one module whose name agrees with it up to a prefix
    ("bert.encoder.layer.0" and "encoder.layer.0", the same base under another head).

    Args:
        model: A model, with or without adapters.
        names: Module names of a subspace.
        shapes: (out_features, in_features) by name, to choose among several modules that a name would fit.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"encoder": nn.ModuleDict({"q": nn.Linear(2, 2)})})
        >>> match_modules(model, ["bert.encoder.q", "bert.encoder.v"])
        ModuleMatches(found={'encoder.q': 'bert.encoder.q'}, missing=('bert.encoder.v',), contested={})
    """
    modules = {path.removesuffix(".base_layer"): module for path, module in model.named_modules() if path}
    today = _renaming(model)
    spellings = {name: tuple(dict.fromkeys((name, today(name)))) for name in names}
    owner = {name: name for name in spellings if name in modules}
    for name, (*_, new) in spellings.items():
        if name not in owner and new in modules:
            owner.setdefault(new, name)
    placed = set(owner.values())
    loose = {name: spelled for name, spelled in spellings.items() if name not in placed}
    claims: dict[str, list[str]] = {}
    for name, paths in _by_end(loose, modules).items():
        free = [path for path in paths if path not in owner]
        fitting = [path for path in free if shapes is None or _fits(modules[path], shapes[name])]
        claims[name] = fitting or free
    n_claims = Counter(path for paths in claims.values() for path in paths)
    alone = {name for name, paths in claims.items() if len(paths) == 1 and n_claims[paths[0]] == 1}
    owner |= {claims[name][0]: name for name in alone}
    return ModuleMatches(
        found={path: owner[path] for path in modules if path in owner},
        missing=tuple(name for name, paths in claims.items() if not paths),
        contested={name: tuple(paths) for name, paths in claims.items() if paths and name not in alone},
    )


def _by_end(names: Mapping[str, tuple[str, ...]], modules: Iterable[str]) -> dict[str, list[str]]:
    """For each name the modules that agree with one of its spellings up to a prefix of either."""
    modules = dict.fromkeys(modules)
    wanted = {spelling for spellings in names.values() for spelling in spellings}
    longer: dict[str, list[str]] = {}
    for path in modules:
        for end in shorter_ends(path):
            if end in wanted:
                longer.setdefault(end, []).append(path)
    return {
        name: list(
            dict.fromkeys(
                path
                for spelling in spellings
                for path in (*longer.get(spelling, ()), *(end for end in shorter_ends(spelling) if end in modules))
            )
        )
        for name, spellings in names.items()
    }


def _fits(module: Any, shape: tuple[int, int]) -> bool:
    """Whether a module can have a weight of that shape; modules that do not tell are believed."""
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return None in sizes or sizes == shape


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """What transformers calls a module today, given the name that it had when an adapter was saved."""
    if get_model_conversion_mapping is None or not hasattr(getattr(model, "config", None), "model_type"):
        return lambda name: name
    known: Any = model
    renamings: list[Any] = [entry for entry in get_model_conversion_mapping(known) if isinstance(entry, WeightRenaming)]
    # With the ending of a weight, for which transformers' patterns are made.
    return lambda name: rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
