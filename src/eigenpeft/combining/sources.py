"""What can be merged, seen alike: adapters of a collection, members of a store, adapters of a PEFT model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from eigenpeft.collection import AdapterCollection
from eigenpeft.combining.heads import OtherParts, parts_of, parts_of_files
from eigenpeft.errors import CollectionError
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners.files.export import contents_of_model
from eigenpeft.tuners.files.store_export import contents_of_member

Adapters = AdapterCollection | AdapterStore | PeftModel | str | Path | Sequence[str | Path]
"""What `merge` takes: an open collection, folders and Hub ids, a store, or a PEFT model with several adapters."""


class CollectionSources:
    """Adapters on disk: their updates, module by module, and what else a merged adapter needs from them.

    Args:
        collection: The adapters.

    Raises:
        OSError, ValueError: If a file is gone or was damaged since the collection was opened.
        CollectionError: If an adapter has trained tensors that are not merged.

    Attributes:
        names: Adapters, in order.
        modules: All modules that any of them adapts.
        records: JSON-able record of each adapter: name, source, license, rank, alpha.
        parts: What the adapters hold besides their factors.
        base_model: Base model, if known.
        task_type: PEFT's task type, where all agree.
    """

    def __init__(self, collection: AdapterCollection):
        self._collection = collection
        self.names, self.modules = collection.names, collection.modules
        self.base_model = collection.base_model
        self.task_type = common({adapter.task_type for adapter in collection.adapters})
        self.parts = parts_of_files(collection)
        self.records = tuple(adapter.record() for adapter in collection.adapters)

    def updates(self, module: str) -> dict[str, Factors]:
        """`(lora_B, lora_A)` of each adapter that has a module, scaling folded in.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts the module.
            CollectionError: If a tensor cannot be read or is not finite.
        """
        return {read.adapter: (read.lora_B, read.lora_A) for read in self._collection.each_factors(module)}

    def largest_rank(self, module: str) -> int:
        """Rank that a merged update can have: the adapters' ranks together, or the weight's smaller side.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts the module.
        """
        return min(sum(self._collection.ranks(module).values()), *self._collection.shapes[module])

    def is_embedding(self, module: str) -> bool:
        """Whether LoRA keeps a module's factors as an embedding's.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts the module.
        """
        return self._collection.is_embedding(module)

    def fan_in_fan_out(self, module: str) -> bool:
        """Whether a module's base weight is stored transposed.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts the module.
        """
        return self._collection.fan_in_fan_out(module)


@dataclass(frozen=True)
class LoadedSources:
    """Members of a store or adapters of a model; see `CollectionSources`.

    Attributes:
        names: Adapters, in order.
        records: JSON-able record of each adapter.
        parts: What they hold besides their factors.
        base_model: Base model, if known.
        task_type: PEFT's task type, where all agree.
        read: Updates of a module by adapter.
        largest: Largest rank of a merged update, by module.
        embeddings: Modules that are embeddings.
        transposed: Modules whose base weights are stored transposed.
    """

    names: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    parts: OtherParts
    base_model: str | None
    task_type: str | None
    read: Callable[[str], dict[str, Factors]]
    largest: Mapping[str, int]
    embeddings: frozenset[str] = field(default_factory=frozenset)
    transposed: frozenset[str] = field(default_factory=frozenset)

    @property
    def modules(self) -> tuple[str, ...]:
        """See `CollectionSources.modules`."""
        return tuple(self.largest)

    def updates(self, module: str) -> dict[str, Factors]:
        """See `CollectionSources.updates`."""
        return self.read(module)

    def largest_rank(self, module: str) -> int:
        """See `CollectionSources.largest_rank`."""
        return self.largest[module]

    def is_embedding(self, module: str) -> bool:
        """See `CollectionSources.is_embedding`."""
        return module in self.embeddings

    def fan_in_fan_out(self, module: str) -> bool:
        """See `CollectionSources.fan_in_fan_out`."""
        return module in self.transposed


Sources = CollectionSources | LoadedSources
"""What `merge` works on."""


def open_sources(
    adapters: Adapters, *, names: Sequence[str] | None = None, allow_different_base_models: bool = False
) -> Sources:
    """Open what a user passed to `merge`.

    Args:
        adapters: See `Adapters`.
        names: Take these alone, in this order; None takes all.
        allow_different_base_models: As for `AdapterCollection.from_pretrained`.

    Raises:
        CollectionError: If adapters cannot be read together, a name is unknown, or one has trained parts that nothing can
            merge.
        ArtifactError: If a member of a store cannot be read.
        AdapterConfigError: If a plain LoRA cannot express an adapter.
        OSError, ValueError: If a file is gone or was damaged since the collection was opened.
    """
    if isinstance(adapters, PeftModel):
        return _of_model(adapters, names)
    if isinstance(adapters, AdapterStore):
        return _of_store(adapters, names)
    if not isinstance(adapters, AdapterCollection):
        adapters = AdapterCollection.from_pretrained(
            adapters, embeddings=True, allow_different_base_models=allow_different_base_models
        )
    return CollectionSources(adapters if names is None else adapters.subset(names))


def common(values: set[str | None]) -> str | None:
    """The one value that all have, else None.

    Args:
        values: Values of each adapter.
    """
    return next(iter(values)) if len(values) == 1 else None


def _of_store(store: AdapterStore, names: Sequence[str] | None) -> LoadedSources:
    chosen = _chosen(store.names, names, where="the store")
    # Cores are small; factors are made of them module by module.
    members = {name: store[name] for name in chosen}
    others = {name: contents_of_member(store, name)[2] for name in chosen}
    info, subspace = store.subspace.info, store.subspace
    paths = {module: next((m.path(module) for m in members.values() if module in m), None) for module in subspace}
    modules = {path: module for module, path in paths.items() if path is not None}
    records = tuple(dict(member.record) for member in members.values())
    return LoadedSources(
        names=chosen,
        records=records,
        parts=parts_of(
            {name: tuple(own) for name, own in others.items()},
            saved={name: tuple(member.config.get("modules_to_save") or ()) for name, member in members.items()},
            read=lambda name, key: others[name][key],
        ),
        base_model=info.base_model_name_or_path,
        task_type=common({record.get("task_type") for record in records}),
        read=lambda path: {
            name: subspace.reconstruct({modules[path]: member[modules[path]]})[modules[path]]
            for name, member in members.items()
            if modules[path] in member
        },
        largest={
            path: min(len(subspace[module].components_out), len(subspace[module].components_in))
            for path, module in modules.items()
        },
        embeddings=frozenset(path for path, module in modules.items() if module in info.embeddings),
        transposed=frozenset(path for path, module in modules.items() if module in info.fan_in_fan_out),
    )


def _of_model(model: PeftModel, names: Sequence[str] | None) -> LoadedSources:
    chosen = _chosen(tuple(model.peft_config), names, where="the model")
    factors: dict[str, dict[str, Factors]] = {}
    problems, records, embeddings, transposed, task_types = [], [], set(), set(), set()
    others: dict[str, dict[str, Tensor]] = {}
    for name in chosen:
        updates, fields, others[name] = contents_of_model(model, name)
        for update in updates:
            if update.n_blocks > 1 or update.kind != "module" or update.lora_A.ndim != 2:
                problems.append(
                    f"Adapter {name!r} adapts {update.target!r}, a convolution, an attention as a whole or a stack of "
                    "experts, whose update is not a single matrix; leave it out."
                )
                continue
            pair = update.lora_B * update.scaling, update.lora_A
            factors.setdefault(update.target, {})[name] = pair
            embeddings |= {update.target} if "lora_embedding_A" in update.keys[0] else set()
            transposed |= {update.target} if fields["fan_in_fan_out"] else set()
        config = model.peft_config[name]
        task = getattr(config.task_type, "value", config.task_type)
        task_types.add(None if task is None else str(task))
        records.append({"name": name, "source": name, "rank": getattr(config, "r", None), "license": None})
    if problems:
        raise CollectionError(problems)
    parts = parts_of(
        {name: tuple(own) for name, own in others.items()},
        saved={name: tuple(model.peft_config[name].modules_to_save or ()) for name in chosen},  # pyright: ignore[reportAttributeAccessIssue]
        read=lambda name, key: others[name][key].detach().cpu(),
    )
    return LoadedSources(
        names=chosen,
        records=tuple(records),
        parts=parts,
        base_model=model.peft_config[chosen[0]].base_model_name_or_path,
        task_type=common(task_types),
        read=lambda module: dict(factors[module]),
        largest={module: _largest_rank(list(pairs.values())) for module, pairs in factors.items()},
        embeddings=frozenset(embeddings),
        transposed=frozenset(transposed),
    )


def _largest_rank(pairs: Sequence[Factors]) -> int:
    return min(sum(len(lora_A) for _, lora_A in pairs), len(pairs[0][0]), pairs[0][1].shape[1])


def _chosen(present: tuple[str, ...], names: Sequence[str] | None, *, where: str) -> tuple[str, ...]:
    unknown = [name for name in names or () if name not in present]
    if unknown or not present:
        raise CollectionError(
            [f"names={unknown} are not in {where}, which has {', '.join(map(repr, present[:20])) or 'no adapters'}."]
        )
    return present if names is None else tuple(dict.fromkeys(names))
