"""One bank for all layers of a kind: the updates of many modules of one shape stacked together."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from huggingface_hub.utils import tqdm

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import CollectionError, SubspaceError
from eigenpeft.linalg.bases.fitting import METHODS, WEIGHTINGS, Method, Weighting, fit_bases
from eigenpeft.linalg.bases.stacking import Factors, FactorStream
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.seeding import seeded_generator


def last_name(module: str) -> str:
    """The last part of a module's name that is not a number: "q_proj", the same in every layer.

    Args:
        module: Name of a module.

    Examples:
        >>> last_name("model.layers.7.self_attn.q_proj")
        'q_proj'
    """
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), module)


def group_of(share: str | Sequence[str] | Callable[[str], str] | None) -> Callable[[str], str]:
    """From what a user says to the kind of a module; modules of one kind and shape share a bank.

    Args:
        share: "layers" for `last_name`; `fnmatch` patterns, of which the first that fits a module is its kind, while modules
            that fit none keep banks of their own; or a function.

    Raises:
        SubspaceError: If it is none of these.

    Examples:
        >>> group_of(["*.q_proj", "*.k_proj"])("layers.3.q_proj"), group_of(["*.q_proj"])("layers.3.v_proj")
        ('*.q_proj', 'layers.3.v_proj')
    """
    if share == "layers":
        return last_name
    if callable(share):
        return share
    if share is None or isinstance(share, str) or not all(isinstance(pattern, str) for pattern in share):
        raise SubspaceError(
            f"share={share!r} must be 'layers', a list of patterns such as ['*.q_proj'], a function of a module's name, or None "
            "for a bank per module."
        )
    patterns = list(share)
    return lambda module: next((pattern for pattern in patterns if fnmatchcase(module, pattern)), module)


def refuse_unshared(n_pseudo_components: int, memory_limit: int | None) -> None:
    """Refuse settings of a builder that shared banks do not have.

    Args:
        n_pseudo_components: N pseudo components of the builder.
        memory_limit: Memory limit of the builder.

    Raises:
        SubspaceError: If one is set.
    """
    if n_pseudo_components or memory_limit is not None:
        raise SubspaceError(
            f"share= goes without n_pseudo_components and memory_limit; got {n_pseudo_components} and {memory_limit}. Leave them "
            "out, or build a bank per module."
        )


def build_shared_subspace(
    collection: AdapterCollection,
    *,
    n_components: Any = 32,
    method: Method = "balanced",
    weighting: Weighting = "equal",
    kind_of: Callable[[str], str] = last_name,
    seed: int = 0,
    tol: float = 1e-4,
    progress: bool = True,
) -> PrincipalSubspace:
    """A subspace in which the modules of one kind and shape share one bank, fitted to the updates of all of them.

    Its bytes are those of one layer, whatever the number of layers. It holds less of the adapters than a bank for each
    module does at the same K: compare `explained_share` before relying on it (docs/how-to.md has figures).

    Args:
        collection: Adapters of one base model. All factors of one kind of module are in memory at a time.
        n_components: K of every bank: a number (None for 32), or a share in (0, 1] of the updates of all modules of the bank.
        method: As for `SubspaceBuilder`.
        weighting: As for `SubspaceBuilder`; "equal" counts every adapter equally in every module.
        kind_of: From a module's name to its kind; modules of one kind and one shape share a bank.
        seed: Seed of the iterative solver.
        tol: Tolerance of the solver.
        progress: Show a progress bar.

    Returns:
        A subspace; the explained shares of a bank are those of all its modules together.

    Raises:
        SubspaceError: If an argument is out of range, or a group has fewer independent directions than `n_components`.
        CollectionError: If an adapter cannot be read or holds NaN or infinity.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> subspace = build_shared_subspace(collection, n_components=2, progress=False)
        >>> len(subspace), len(subspace.banks)  # a bank for query, one for value
        (12, 2)
    """
    for name, value, allowed in (("method", method, METHODS), ("weighting", weighting, WEIGHTINGS)):
        if value not in allowed:
            raise SubspaceError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")
    n_components = 32 if n_components is None else n_components
    if isinstance(n_components, bool) or not isinstance(n_components, int | float):
        raise SubspaceError(
            f"n_components={n_components!r} cannot be looked for in shared banks; pass one number, or one share in (0, 1]."
        )
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for module in collection.modules:
        groups.setdefault((kind_of(module), collection.shapes[module]), []).append(module)
    bank_of: dict[str, ModuleSubspace] = {}
    for (kind, shape), modules in tqdm(groups.items(), desc="Fitting", unit="bank", disable=not progress):
        generator = seeded_generator(seed, f"{kind} {shape}", "solver")
        try:
            fitted = fit_bases(
                _stream(collection, modules),
                n_components=n_components,
                method=method,
                weighting=weighting,
                tol=tol,
                generator=generator,
            )
        except CollectionError:  # an adapter that cannot be read, which is no fault of the bank
            raise
        except ValueError as error:
            raise SubspaceError(f"The bank of {len(modules)} modules, such as {modules[0]!r}: {error}") from error
        bank = ModuleSubspace(
            components_in=fitted.components_in.float(),
            components_out=fitted.components_out.float(),
            singular_values_in=fitted.singular_values_in.float(),
            singular_values_out=fitted.singular_values_out.float(),
            explained_variance_ratio=fitted.explained_variance_ratio.float(),
            paired=fitted.paired,
        )
        bank_of |= dict.fromkeys(modules, bank)
    info = SubspaceInfo(
        base_model_name_or_path=collection.base_model,
        method=method,
        weighting=weighting,
        n_components=n_components,
        seed=seed,
        sources=tuple(adapter.record() for adapter in collection.adapters),
        measured_on=collection.names,
        fan_in_fan_out=tuple(module for module in collection.modules if collection.fan_in_fan_out(module)),
        embeddings=tuple(module for module in collection.modules if collection.is_embedding(module)),
    )
    return PrincipalSubspace({module: bank_of[module] for module in collection.modules}, info=info)


def _stream(collection: AdapterCollection, modules: Sequence[str]) -> FactorStream:
    """The factors of all adapters on all modules, read one after another."""

    def read() -> Iterator[Factors]:
        for module in modules:
            for factors in collection.each_factors(module):
                yield factors.lora_B, factors.lora_A

    return FactorStream(n_rows=sum(sum(collection.ranks(module).values()) for module in modules), read=read)
