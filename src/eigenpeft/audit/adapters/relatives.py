"""Held-out shares that need all modules' likenesses first: without an adapter's relatives, and by its own cluster alone."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from eigenpeft.audit.adapters.averages import by_adapter
from eigenpeft.audit.adapters.measures import trained_stacks
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.diagnosis import Finding
from eigenpeft.linalg.scores.leave_one_out import held_out_curves

# Mean cosine of ΔW above which two adapters are reported as related; independent ones have about 1 / √(m n) of each other.
RELATED_COSINE = 0.2
# Strangers that an adapter needs for its share without relatives to count, and the adapters that must have them.
_FEWEST_STRANGERS = 2
_ENOUGH_ADAPTERS = 0.5


def related_findings(names: Sequence[str], similarity: Tensor) -> list[Finding]:
    """One finding per pair of related adapters.

    Args:
        names: The n adapters.
        similarity: (n, n) mean cosines of ΔW.
    """
    found = []
    for i, j in (similarity.triu(diagonal=1) > RELATED_COSINE).nonzero().tolist():
        cosine = float(similarity[i, j])
        message = (
            f"{names[i]!r} and {names[j]!r} have related updates (mean cosine {cosine:.2f} over the modules that both have), "
            "as runs on the same data have: what they share says little about other tasks."
        )
        found.append(Finding(kind="related", adapters=(str(names[i]), str(names[j])), message=message, value=cosine))
    return found


def without_relatives(
    collection: AdapterCollection,
    *,
    modules: Sequence[str],
    names: Sequence[str],
    groups: Mapping[str, Hashable],
    similarity: Tensor,
    n_components: int,
) -> Tensor | None:
    """(n, K) held-out shares, each adapter left out with its group and with every adapter related to it.

    Adapters that truly share a small subspace are related to many by chance, to those on the other side of each
    direction they are not; so only an adapter's own relatives are hidden from it, not theirs in turn.

    Args:
        collection: Read once more.
        modules: Measured modules.
        names: Trained adapters.
        groups: Adapter to the label of its group.
        similarity: (n, n) mean cosines of ΔW.
        n_components: Largest K.

    Returns:
        NaN for adapters with fewer than two strangers; None where leaving out relatives changes nothing, or where fewer
        than half of the adapters have so many.

    Raises:
        KeyError: If no adapter adapts a module.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    labels = [groups[name] for name in names]
    grouped = torch.tensor([[one == other for other in labels] for one in labels])
    hidden = grouped | (similarity > RELATED_COSINE)
    judged = (~hidden).sum(dim=1) >= _FEWEST_STRANGERS
    if torch.equal(hidden, grouped) or judged.float().mean() < _ENOUGH_ADAPTERS:
        return None
    shares = _held_out_hiding(collection, modules=modules, names=names, hidden=hidden, n_components=n_components)
    shares[~judged] = torch.nan
    return shares


def cluster_gain(
    collection: AdapterCollection,
    *,
    modules: Sequence[str],
    names: Sequence[str],
    clusters: Sequence[Sequence[str]],
    n_components: int,
) -> float | None:
    """Held-out share by an adapter's own cluster less that by all others, mean over adapters in clusters of at least three.

    Args:
        collection: Read once more.
        modules: Measured modules.
        names: Trained adapters.
        clusters: Groups of them.
        n_components: K.

    Returns:
        None where fewer than two clusters have three adapters.

    Raises:
        KeyError: If no adapter adapts a module.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    large = {name for part in clusters if len(part) >= 3 for name in part}
    if sum(len(part) >= 3 for part in clusters) < 2:
        return None
    number = {name: i for i, part in enumerate(clusters) for name in part}
    labels = torch.tensor([number[name] for name in names])
    alone = torch.eye(len(names), dtype=torch.bool)
    by_all, by_own = (
        _held_out_hiding(collection, modules=modules, names=names, hidden=hidden, n_components=n_components)[:, -1]
        for hidden in (alone, alone | (labels[:, None] != labels))
    )
    return float((by_own - by_all)[torch.tensor([name in large for name in names])].nanmean())


def _held_out_hiding(
    collection: AdapterCollection, *, modules: Sequence[str], names: Sequence[str], hidden: Tensor, n_components: int
) -> Tensor:
    index = {name: i for i, name in enumerate(names)}
    parts = []
    for module in modules:
        trained, stacks = trained_stacks(collection.factors(module))
        where = torch.tensor([index[each.adapter] for each in trained])
        curves = held_out_curves(stacks, n_components=n_components, hidden=hidden[where][:, where])
        parts.append(([each.adapter for each in trained], curves.both))
    return by_adapter(names, parts)
