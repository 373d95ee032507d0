"""What clients send after a round: their tensors by PEFT's names, and which of them can be used."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from eigenpeft.linalg.orthogonal import random_complement

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?:weight|coefficients))?")
FREE_LENGTH = "zeroth_order."
"""What the keys of lists begin with, whose length each client has of its own."""
_SHOWN = 3  # names in one message


@dataclass(frozen=True)
class ClientUpdate:
    """One client's adapter after its part of a round.

    Attributes:
        name: Name of the client in messages.
        tensors: By the keys of PEFT's adapter state dict, in its shapes: lora_A (r, in_features), lora_B (out_features, r),
            parts of cores as `CORES` has them.
        n_rows: Rows it trained on, its weight in the mean.
        scaling: `lora_alpha / r` (or `/ sqrt(r)`) of its adapter.
        base: What it was trained on: a name, or a fingerprint; None where the client does not say.
    """

    name: str
    tensors: Mapping[str, Tensor]
    _: KW_ONLY
    n_rows: float = 1.0
    scaling: float = 1.0
    base: str | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def factor_keys(keys: Mapping[str, object] | Sequence[str]) -> dict[str, dict[str, str]]:
    """Module to `{"A": key, "B": key}` of its factors: LoRA's weights, or EigenLoRA's coefficients.

    Args:
        keys: Keys of an adapter's tensors.

    Examples:
        >>> factor_keys(["q.lora_A.weight", "q.lora_B.weight", "classifier.bias"])
        {'q': {'A': 'q.lora_A.weight', 'B': 'q.lora_B.weight'}}
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match is not None:
            found.setdefault(match["module"], {})[match["side"]] = key
    return found


def keep_usable(
    updates: Sequence[ClientUpdate],
    *,
    expected: Mapping[str, Tensor],
    equal_ranks: bool = True,
    base: str | None = None,
) -> tuple[list[ClientUpdate], dict[str, str]]:
    """The updates that can be averaged, and why each of the others is left out, by name.

    Args:
        updates: Updates of one round.
        expected: The server's tensors, whose keys and shapes the clients' must have.
        equal_ranks: Whether ranks must be the server's, too; otherwise each client may have its own in every module.
        base: What the clients must have trained on; None does not ask.

    Examples:
        >>> import torch
        >>> whole = ClientUpdate("a", {"q.lora_B.weight": torch.ones(2, 1)})
        >>> broken = ClientUpdate("b", {"q.lora_B.weight": torch.full((2, 1), torch.nan)})
        >>> used, left_out = keep_usable([whole, broken], expected=whole.tensors)
        >>> [update.name for update in used], left_out
        (['a'], {'b': '1 of its 1 tensors holds NaN or infinite numbers: q.lora_B.weight'})
    """
    used, left_out, seen = [], {}, set()
    for update in updates:
        reason = _problem(update, expected, equal_ranks=equal_ranks, base=base)
        if update.name in seen:
            reason = "it sent a second update in one round"
        seen.add(update.name)
        if reason is None:
            used.append(update)
        else:
            left_out[update.name] = reason
    return used, left_out


def fit_rank(tensors: Mapping[str, Tensor], *, rank: int, scaling: float, own_scaling: float) -> dict[str, Tensor]:
    """An averaged adapter as a client of another rank or scaling starts from it.

    A smaller rank is the best approximation, since averaged factors are in the order of their singular values. A larger one
    gets rows of A that are orthogonal to the others, with zeros in B, so that the update is the same and all of it trains.

    Args:
        tensors: As `average` gives them.
        rank: The client's r.
        scaling: Scaling of the averaged adapter.
        own_scaling: The client's.

    Examples:
        >>> tensors = {"0.lora_A.weight": torch.eye(2, 4), "0.lora_B.weight": torch.eye(3, 2)}
        >>> {key: tuple(tensor.shape) for key, tensor in fit_rank(tensors, rank=1, scaling=1.0, own_scaling=2.0).items()}
        {'0.lora_A.weight': (1, 4), '0.lora_B.weight': (3, 1)}
    """
    fitted = dict(tensors)
    for sides in factor_keys(tensors).values():
        if "A" in sides:
            lora_A = tensors[sides["A"]][:rank]
            fitted[sides["A"]] = _with_more_rows(lora_A, rank)
        if "B" in sides:
            lora_B = tensors[sides["B"]]
            if "A" in sides:
                lora_B = torch.nn.functional.pad(lora_B[:, :rank], (0, max(0, rank - lora_B.shape[1])))
            fitted[sides["B"]] = lora_B * (scaling / own_scaling)
    return fitted


def fill_rows(lora_A: Tensor, *, norm: float) -> Tensor:
    """A with directions in the place of rows of zeros, which could never train together with zeros in B.

    Args:
        lora_A: (r, n).
        norm: Norm of the new rows.

    Returns:
        (r, n): lora_A itself where no row is zero or no direction is left.

    Example:
        >>> fill_rows(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), norm=2.0).abs()
        tensor([[1., 0.],
                [0., 2.]])
    """
    empty = torch.linalg.vector_norm(lora_A, dim=1) == 0
    n_empty, width = int(empty.sum()), lora_A.shape[1]
    present = lora_A[~empty]
    n_new = min(n_empty, width - len(present))
    if n_new < 1:
        return lora_A
    generator = torch.Generator().manual_seed(len(lora_A))
    rows = random_complement(present, n_pseudo_components=n_new, generator=generator) * norm
    filled = lora_A.clone()
    filled[empty.nonzero().flatten()[:n_new]] = rows.to(lora_A.dtype)
    return filled


def _with_more_rows(lora_A: Tensor, rank: int) -> Tensor:
    if len(lora_A) >= rank:
        return lora_A
    norm = float(torch.linalg.vector_norm(lora_A, dim=1).mean())
    return fill_rows(torch.nn.functional.pad(lora_A, (0, 0, 0, rank - len(lora_A))), norm=norm)


def _problem(
    update: ClientUpdate, expected: Mapping[str, Tensor], *, equal_ranks: bool, base: str | None
) -> str | None:
    if base is not None and update.base != base:
        return f"it was trained on the base {update.base!r}, and this federation trains on {base!r}"
    if not (math.isfinite(update.n_rows) and update.n_rows > 0):
        return f"its number of rows is {update.n_rows}, which must be above 0"
    if not (math.isfinite(update.scaling) and update.scaling > 0):
        return f"its scaling is {update.scaling}, which must be above 0"
    missing = [key for key in expected if key not in update.tensors]
    extra = [key for key in update.tensors if key not in expected]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(extra)}, which the server does not know"] if extra else []
        return f"it {' and '.join(parts)}"
    ranks = _free_axes(expected, equal_ranks=equal_ranks)
    for key, tensor in expected.items():
        own, wanted = list(update.tensors[key].shape), list(tensor.shape)
        if len(own) == len(wanted) and key in ranks:
            own[ranks[key]] = wanted[ranks[key]] = 0
        if own != wanted:
            shapes = f"{tuple(update.tensors[key].shape)}, and {tuple(tensor.shape)} is expected"
            return f"its {key} has the shape {shapes}" + (
                "; this rule needs equal ranks (rule='exact' does not)" if equal_ranks else ""
            )
    for module, sides in factor_keys(expected).items() if not equal_ranks else ():
        if len(sides) == 2 and len(update.tensors[sides["A"]]) != update.tensors[sides["B"]].shape[1]:
            return f"its factors of {module!r} have different ranks"
    broken = [key for key, tensor in update.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        verb = "holds" if len(broken) == 1 else "hold"
        return f"{len(broken)} of its {len(expected)} tensors {verb} NaN or infinite numbers: {_some(broken)}"
    return None


def _free_axes(expected: Mapping[str, Tensor], *, equal_ranks: bool) -> dict[str, int]:
    """Key to the axis that is a rank, where ranks may differ, or the length of a list; a lone B has none."""
    axes = {key: 0 for key in expected if key.startswith(FREE_LENGTH)}
    if equal_ranks:
        return axes
    for sides in factor_keys(expected).values():
        if len(sides) == 2:
            axes |= {sides["A"]: 0, sides["B"]: 1}
    return axes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
