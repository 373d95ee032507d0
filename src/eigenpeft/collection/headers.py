"""Findings that need no tensor: what is kept aside, which modules some adapters lack, which names were aligned, unknown fields."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from eigenpeft.collection.adapter import OpenAdapter
from eigenpeft.collection.diagnosis import Finding
from eigenpeft.collection.formats.keys import natural_order
from eigenpeft.collection.formats.settings import CONFIG_NAME
from eigenpeft.collection.opening import some


def findings_of_headers(adapters: Sequence[OpenAdapter]) -> tuple[Finding, ...]:
    """One finding for each group of adapters with the same oddity.

    Args:
        adapters: Opened adapters.
    """
    return (
        *_kept_aside(adapters),
        *_missing_modules(adapters),
        *_aligned_names(adapters),
        *_unknown_fields(adapters),
        *_adapters_below(adapters),
    )


def _kept_aside(adapters: Sequence[OpenAdapter]) -> Iterator[Finding]:
    for keys, names in _groups([(adapter.info.kept_aside, adapter.info.name) for adapter in adapters]):
        if keys:
            message = (
                f"{some(names)}: {len(keys)} tensors are not weight updates of an adapted module, such as a head; a subspace holds "
                f"none of them, a store keeps them beside: {some(keys)}."
            )
            yield Finding(kind="kept_aside", adapters=names, message=message, value=float(len(keys)))


def _missing_modules(adapters: Sequence[OpenAdapter]) -> Iterator[Finding]:
    modules = sorted({module for adapter in adapters for module in adapter.locations}, key=natural_order)
    for present, names in _groups([(adapter.info.modules, adapter.info.name) for adapter in adapters]):
        absent = [module for module in modules if module not in set(present)]
        if absent:
            message = f"{some(names)}: {len(absent)} of the {len(modules)} modules have no update, {some(absent)}."
            yield Finding(kind="missing_modules", adapters=names, message=message, value=float(len(absent)))


def _aligned_names(adapters: Sequence[OpenAdapter]) -> Iterator[Finding]:
    for aligned, names in _groups([(tuple(adapter.aligned.items()), adapter.info.name) for adapter in adapters]):
        if aligned:
            old, new = aligned[0]
            message = (
                f"{some(names)}: {len(aligned)} modules are named otherwise than in the other adapters, {old!r} for "
                f"{new!r}, and were taken for the same."
            )
            yield Finding(kind="aligned_names", adapters=names, message=message, value=float(len(aligned)))


def _unknown_fields(adapters: Sequence[OpenAdapter]) -> Iterator[Finding]:
    for fields, names in _groups([(adapter.unknown_fields, adapter.info.name) for adapter in adapters]):
        if fields:
            message = (
                f"{some(names)}: the config sets {some(fields)}, which no version of PEFT up to 0.21 has. If a newer one or "
                "another tool changes the update by it, what was read is not the adapter's update; ask its author."
            )
            yield Finding(kind="unknown_fields", adapters=names, message=message, value=float(len(fields)))


def _adapters_below(adapters: Sequence[OpenAdapter]) -> Iterator[Finding]:
    """PEFT saves the other adapters of a model in folders below the first one's; a folder named itself is one adapter."""
    read = {Path(adapter.info.weights_path).resolve().parent for adapter in adapters}
    for adapter in adapters:
        folder = Path(adapter.info.weights_path).resolve().parent
        below = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
        unread = [path.name for path in below if path not in read and not path.name.startswith((".", "checkpoint-"))]
        if unread:
            message = (
                f"{adapter.info.name!r}: {len(unread)} adapters in folders below it were not read, {some(unread)}. Name their "
                "folders too if they are meant."
            )
            yield Finding(
                kind="adapters_below", adapters=(adapter.info.name,), message=message, value=float(len(unread))
            )


def _groups(keyed: Sequence[tuple[tuple, str]]) -> list[tuple[tuple, tuple[str, ...]]]:
    groups: dict[tuple, list[str]] = {}
    for key, name in keyed:
        groups.setdefault(key, []).append(name)
    return [(key, tuple(names)) for key, names in groups.items()]
