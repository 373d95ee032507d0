"""Class prototypes in the feature spaces of several frozen adapters, completed where a class's rows are gone (EASE)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def class_means(
    features: Float[Tensor, "p d"], labels: Int[Tensor, " p"], *, n_classes: int
) -> Float[Tensor, "n_classes d"]:
    """`P_c`: the mean of the features of each class's rows, its prototype.

    Args:
        features: Features of rows, in the space of one adapter.
        labels: 0 to `n_classes - 1`.
        n_classes: C.

    Raises:
        ValueError: If a class has no row, or a label is out of range.

    Example:
        >>> import torch
        >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), n_classes=2).tolist()
        [[2.0], [5.0]]
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} must be from 0 to {n_classes - 1}; number the classes so."
        )
    counts = torch.bincount(labels, minlength=n_classes)
    if not bool(counts.all()):
        raise ValueError(
            f"class {int(counts.argmin())} of {n_classes} has no rows to take a mean of; pass one or more of each."
        )
    sums = features.new_zeros(n_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def complete_prototypes(
    old: Float[Tensor, "c_old d"], new: Float[Tensor, "c_new d"], new_in_own: Float[Tensor, "c_new e"]
) -> Float[Tensor, "c_old e"]:
    """Where old classes would lie in the space of a new adapter, without their rows: `P̂ = softmax(cos(P_old, P_new)) P_new'`.

    The similarity of old and new classes is looked at in the old adapter's space, where both have rows, and carried over to the new
    one's (EASE, arXiv 2403.12030, section 4.2).

    Args:
        old: Prototypes of the old classes in their own adapter's space.
        new: Those of the new classes in the same space.
        new_in_own: Those of the new classes in the new adapter's space.

    Raises:
        ValueError: If there is no new class.

    Example:
        >>> import torch
        >>> same = torch.eye(2)
        >>> complete_prototypes(same, same, torch.tensor([[1.0], [0.0]]))
        tensor([[0.7311],
                [0.2689]])
    """
    if not len(new):
        raise ValueError(
            "There are no new classes whose prototypes could say where the old ones lie; pass at least one in `new`."
        )
    similarity = normalize(old, dim=1) @ normalize(new, dim=1).mT
    return similarity.softmax(dim=1) @ new_in_own


def prototype_logits(
    features: Sequence[Float[Tensor, "p _d"]],
    prototypes: Sequence[Float[Tensor, "n_classes _d"]],
    owners: Int[Tensor, " n_classes"],
    *,
    weight: float = 0.1,
) -> Float[Tensor, "p n_classes"]:
    """`Σ_t w_ct cos(φ_t(x), P_ct)` over adapters t: w is 1 for the one that class c was learnt with, `weight` for the others.

    Args:
        features: φ_t(x) of the same rows, per adapter t.
        prototypes: P_t of all classes, per adapter.
        owners: Number of the adapter that each class was learnt with.
        weight: Weight of the other spaces; 0.1 in EASE (arXiv 2403.12030).

    Raises:
        ValueError: If `features` and `prototypes` differ in number.
    """
    logits = []
    for number, (own, means) in enumerate(zip(features, prototypes, strict=True)):
        cosines = normalize(own, dim=1) @ normalize(means, dim=1).mT
        scale = cosines.new_full(owners.shape, weight)
        scale[owners == number] = 1.0
        logits.append(cosines * scale)
    return torch.stack(logits).sum(dim=0)
