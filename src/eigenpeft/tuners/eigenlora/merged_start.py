"""The merged update that an adapter starts from: adapters on disk or members of a store, by a published merging rule."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenpeft.artifacts.storage import STORE
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError, SubspaceNotFoundError
from eigenpeft.linalg import Factors
from eigenpeft.linalg.merging import RULES, check_options, merge_updates
from eigenpeft.subspace import AdapterStore
from eigenpeft.subspace.seeding import seeded_generator

Adapters = AdapterCollection | AdapterStore | str | Path | Sequence[str | Path]
"""An open collection, an open store, the folder or Hub id of a store, or folders and Hub ids of LoRA adapters."""


def check_rule(rule: str, options: Mapping[str, Any] | None) -> None:
    """Refuse a rule, or options of it, before anything is read.

    Args:
        rule: Name in `eigenpeft.linalg.merging.RULES`.
        options: The rule's own.

    Raises:
        AdapterConfigError: If it is unknown, needs statistics of inputs, or takes no such options.
    """
    try:
        check_options(rule, **(options or {}))
    except (ValueError, TypeError) as error:
        raise AdapterConfigError(f"init_from={rule!r} with init_options={options!r}: {error}") from error
    if "statistics" in RULES[rule].needs:
        raise AdapterConfigError(
            f"init_from={rule!r} needs statistics of each task's inputs: merge the adapters with eigenpeft.merge(..., "
            "statistics=...), save the result, and name its folder as init_from."
        )


def merged_updates(
    adapters: Adapters,
    *,
    rule: str = "mean",
    scale: float | str | None = None,
    options: Mapping[str, Any] | None = None,
    embeddings: bool = False,
    seed: int = 0,
) -> dict[str, Factors]:
    """Every module's merged update, as `eigenpeft.merge` makes it: core space, rule, λ, nothing cut off.

    Args:
        adapters: What to merge; each has the weight 1.
        rule: Name in `eigenpeft.linalg.merging.RULES`.
        scale: λ; "auto" gives each module the mean norm of its updates (Pico's rule), None takes the rule's own.
        options: The rule's own.
        embeddings: Whether to read updates of embeddings too, from adapters on disk.
        seed: Seed of DARE's draws.

    Returns:
        Module to `(lora_B (m, R), lora_A (R, n))`, float64; modules are named as in the adapters.

    Raises:
        ArtifactError: If a store or a finished merge is damaged.
        CollectionError: If adapters cannot be read together.
        AdapterConfigError: If the rule or its options are unknown, or the updates of a module cannot be merged.
        SubspaceError: If there is no such store, or the tensors of its bases do not fit each other.
    """
    check_rule(rule, options)
    modules, read = _opened(adapters, embeddings=embeddings)
    merged = {}
    for module in modules:
        updates = read(module)
        needs = RULES[rule].needs
        seeds = [seeded_generator(seed, module, f"dare {name}").initial_seed() for name in updates]
        extra: dict[str, Any] = {"seeds": seeds} if "seeds" in needs else {}
        try:
            found = merge_updates(list(updates.values()), rule=rule, scale=scale, **(options or {}), **extra)
        except ValueError as error:
            raise AdapterConfigError(f"init_from={rule!r}: cannot merge {module!r}: {error}") from error
        merged[module] = found.lora_B, found.lora_A
    return merged


def _opened(adapters: Adapters, *, embeddings: bool) -> tuple[Sequence[str], Callable[[str], dict[str, Factors]]]:
    """Names of modules, and the updates of a module by adapter."""
    source = open_adapters(adapters, embeddings=embeddings)
    if isinstance(source, AdapterStore):
        members = {name: source[name] for name in source.names}
        modules = [module for module in source.subspace if any(module in member for member in members.values())]
        return modules, lambda module: {
            name: source.subspace.reconstruct({module: member[module]})[module]
            for name, member in members.items()
            if module in member
        }
    return source.modules, lambda module: {
        read.adapter: (read.lora_B, read.lora_A) for read in source.each_factors(module)
    }


def open_adapters(adapters: Adapters, *, embeddings: bool = False) -> AdapterCollection | AdapterStore:
    """Open what was named.

    Args:
        adapters: See `Adapters`.
        embeddings: As for `AdapterCollection.from_pretrained`.

    Raises:
        CollectionError: If adapters cannot be read together.
        ArtifactError: If a store is damaged.
        SubspaceError: If the tensors of a store's bases do not fit each other.
    """
    if isinstance(adapters, AdapterCollection | AdapterStore):
        return adapters
    if not isinstance(adapters, str | Path) and len(adapters) == 1:
        (adapters,) = adapters
    if isinstance(adapters, str | Path):
        if (Path(adapters) / STORE.config_name).is_file():
            return AdapterStore.from_pretrained(adapters)
        if not Path(adapters).exists():
            try:
                return AdapterStore.from_pretrained(adapters)
            except SubspaceNotFoundError:
                pass  # then it is an adapter on the Hub, or nothing, which the collection says
    return AdapterCollection.from_pretrained(adapters, embeddings=embeddings, allow_different_base_models=True)


def named(adapters: Any) -> str | list[str] | None:
    """What a config file can say of the adapters: paths and Hub ids; None for a store in memory.

    Args:
        adapters: See `Adapters`.
    """
    if isinstance(adapters, AdapterStore):
        return adapters.origin
    if isinstance(adapters, AdapterCollection):
        return [str(Path(adapter.weights_path).parent) for adapter in adapters.adapters]
    if adapters is None or isinstance(adapters, str | Path):
        return None if adapters is None else str(adapters)
    return [str(each) for each in adapters]
