"""What adapters must have in common to be read together: the base model and the shapes of its modules."""

from collections import Counter
from collections.abc import Sequence

from eigenpeft.collection.adapter import OpenAdapter
from eigenpeft.collection.base_models import canonical_base
from eigenpeft.collection.formats.keys import natural_order
from eigenpeft.collection.opening import some


def problems_between(adapters: Sequence[OpenAdapter], *, allow_different_base_models: bool) -> list[str]:
    """Sentences about adapters that do not fit together; empty when all do.

    Args:
        adapters: Opened adapters with aligned module names.
        allow_different_base_models: Whether the configs may name different base models.
    """
    problems = [] if allow_different_base_models else _base_models(adapters)
    return problems + _shapes(adapters)


def _base_models(adapters: Sequence[OpenAdapter]) -> list[str]:
    by_base: dict[str, list[str]] = {}
    revisions = _contradicting_revisions(adapters)
    for adapter in adapters:
        # A config that names no base model, or no revision of it, contradicts nobody.
        if adapter.info.base_model:
            base = canonical_base(adapter.info.base_model)
            revision = adapter.info.base_model_revision if base in revisions else None
            if revision or base not in revisions:
                by_base.setdefault(f"{base} at revision {revision}" if revision else base, []).append(adapter.info.name)
    if len(by_base) < 2:
        return []
    listed = "; ".join(
        f"{base!r} of {some(names)}" for base, names in sorted(by_base.items(), key=lambda item: -len(item[1]))
    )
    return [
        f"The adapters name {len(by_base)} different base models: {listed}. Updates of different models cannot share a "
        "subspace; if these are copies of one model, pass allow_different_base_models=True."
    ]


def _contradicting_revisions(adapters: Sequence[OpenAdapter]) -> set[str]:
    """The base models of which the configs name several revisions: checkpoints of one training run, for example."""
    named: dict[str, set[str]] = {}
    for adapter in adapters:
        if adapter.info.base_model and adapter.info.base_model_revision:
            named.setdefault(canonical_base(adapter.info.base_model), set()).add(adapter.info.base_model_revision)
    return {base for base, revisions in named.items() if len(revisions) > 1}


def _shapes(adapters: Sequence[OpenAdapter]) -> list[str]:
    counts: dict[str, Counter[tuple[int, int]]] = {}
    for adapter in adapters:
        for module, location in adapter.locations.items():
            counts.setdefault(module, Counter())[location.shape] += 1
    usual = {module: shapes.most_common(1)[0] for module, shapes in counts.items()}
    problems = []
    for adapter in adapters:
        unusual = sorted(
            (module for module, location in adapter.locations.items() if location.shape != usual[module][0]),
            key=natural_order,
        )
        if unusual:
            module = unusual[0]
            shape, n_others = usual[module]
            problems.append(
                f"Adapter {adapter.info.name!r} adapts {module!r} as {_times(adapter.locations[module].shape)} "
                f"(out x in), where {n_others} of the {counts[module].total()} adapters with that module have "
                f"{_times(shape)}"
                + (f"; so with {len(unusual) - 1} more modules" if len(unusual) > 1 else "")
                + ". It is of another base model; leave one kind out."
            )
    return problems


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
