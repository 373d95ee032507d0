"""One round's average of adapters: the rules as a table, exact ones and those for comparison."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eigenpeft.combining.federation.seeds import add_steps, odd_steps
from eigenpeft.combining.federation.updates import ClientUpdate, factor_keys, fill_rows, keep_usable
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.factored import frobenius_norm, truncate
from eigenpeft.linalg.merging.apply import merge_updates
from eigenpeft.linalg.merging.factor_means import mean_of_factors, residual_of_factor_mean
from eigenpeft.linalg.merging.registry import RULES

RESIDUE = "residue"
"""Keys `<module>.residue_B` and `<module>.residue_A` hold the residual that clients add to their base weight under "fedex"."""
_A, _B, _REST = "A", "B", "rest"
_FROZEN = (".components", ".cores")  # what all clients have in common, where an adapter's file brings it


@dataclass(frozen=True)
class AveragingRule:
    """One way to average adapters after a round.

    Attributes:
        title: Its name in the literature.
        paper: Where it comes from.
        sent: What travels: "A", "B", and the "rest" (heads, biases, cores without factors).
        equal_ranks: Whether every client must have the server's rank.
        is_exact: Whether the averaged update is the mean of the updates, up to the truncation that is reported.
    """

    title: str
    paper: str
    sent: frozenset[str] = field(default=frozenset({_A, _B, _REST}))
    equal_ranks: bool = True
    is_exact: bool = True


AVERAGING: dict[str, AveragingRule] = {
    # Σ p_i s_i B_i A_i, exactly, as a LoRA of rank Σ r_i; truncated to the server's rank by one SVD in factor-sized work.
    "exact": AveragingRule("FLoRA", "arXiv 2409.05976", equal_ranks=False),
    # Mean of the factors, and what that is off the mean of the updates, for the base weight.
    "fedex": AveragingRule("FedEx-LoRA", "arXiv 2410.09432"),
    # A is shared, B and the head stay each client's own: personal models of one subspace of inputs.
    "fedsa": AveragingRule("FedSA-LoRA", "arXiv 2410.01463", sent=frozenset({_A}), is_exact=False),
    # A stays what all started from: the mean of the B is the mean of the updates. Of a core "low_rank": C_in is frozen.
    "ffa": AveragingRule("FFA-LoRA", "arXiv 2403.12313", sent=frozenset({_B, _REST})),
    # Wrong, and common: for comparison.
    "fedit": AveragingRule("FedIT (mean of the factors)", "arXiv 2305.05644", is_exact=False),
    # No tensor: seeds and lengths of zeroth-order steps, from which all rebuild the mean of the clients' values. Exact for cores
    # of one part; of factors it is FedIT's mean.
    "seeds": AveragingRule("Just One Byte, FedKSeed", "arXiv 2306.10015", sent=frozenset(), is_exact=False),
}
"""Rules of federated averaging by name; every rule of `eigenpeft.merge` that needs no statistics can be named, too."""


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """What a server has after a round.

    Attributes:
        tensors: The averaged adapter, by the clients' keys and in the server's shapes, in float32; with `residue` keys
            under the rule "fedex".
        used: Name of each client that counted to its weight p_i.
        left_out: Name of each of the others to the reason.
        relative_errors: Module to the share of the averaged update's norm that the truncation to the server's rank lost.
        bytes_received: Bytes that the clients sent, those left out included.
    """

    tensors: Mapping[str, Tensor]
    used: Mapping[str, float]
    left_out: Mapping[str, str]
    relative_errors: Mapping[str, float] = field(default_factory=dict)
    bytes_received: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the averaged tensors, which go to each client."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def find_averaging_rule(rule: str) -> AveragingRule:
    """The row of a rule; a merging rule gets one of its own.

    Args:
        rule: Name in `AVERAGING`, or of a merging rule.

    Raises:
        AdapterConfigError: If there is none, or the merging rule needs what clients do not send.
    """
    if rule in AVERAGING:
        return AVERAGING[rule]
    merging = RULES.get(rule)
    usable = [name for name, each in RULES.items() if not each.needs]
    if merging is None or merging.needs:
        why = (
            "is unknown" if merging is None else f"needs {', '.join(sorted(merging.needs))}, which clients do not send"
        )
        raise AdapterConfigError(f"rule={rule!r} {why}; pass one of {', '.join(map(repr, [*AVERAGING, *usable]))}.")
    return AveragingRule(merging.title, merging.paper, equal_ranks=False, is_exact=rule in ("mean", "task_arithmetic"))


def sent_keys(keys: Iterable[str], *, rule: str) -> list[str]:
    """Which of an adapter's tensors travel under a rule; the others stay with their client.

    Args:
        keys: Keys of the adapter.
        rule: As for `average`.

    Raises:
        AdapterConfigError: If there is no such rule.

    Examples:
        >>> sent_keys(["q.lora_A.weight", "q.lora_B.weight", "classifier.weight"], rule="fedsa")
        ['q.lora_A.weight']
    """
    keys = [key for key in keys if not key.endswith(_FROZEN)]
    sides = {key: side for each in factor_keys(keys).values() for side, key in each.items()}
    sent = find_averaging_rule(rule).sent
    return [key for key in keys if sides.get(key, _REST) in sent]


def average(
    updates: Sequence[ClientUpdate],
    *,
    expected: Mapping[str, Tensor],
    rule: str = "exact",
    rank: int | None = None,
    scaling: float = 1.0,
    base: str | None = None,
    **options: Any,
) -> Averaged:
    """Average one round's updates, `p_i = n_i / Σ n`; clients whose update cannot be used are left out and named.

    The rule "exact" gives `ΔW = Σ_i p_i s_i B_i A_i` (out_features, in_features), FedAvg's mean (arXiv 1602.05629,
    algorithm 1) of the updates themselves; `AVERAGING` names the papers of the others. Factors are pairs of LoRA, or the
    two parts of a core "low_rank", whose dense core is then averaged. Cores of one part ("full", "diagonal"), heads and
    biases are averaged number by number, which is exact for them.

    Args:
        updates: Updates of the clients that answered.
        expected: The server's tensors before the round: their keys and shapes are what clients must send.
        rule: Name in `AVERAGING`, or of a merging rule without statistics.
        rank: Rank of the averaged factors; None takes the server's.
        scaling: Scaling of the server's adapter; clients' own is in their updates.
        base: What the clients must have trained on; None does not ask.
        **options: Options of a merging rule.

    Returns:
        `Averaged`; the server's own tensors where no client could be used.

    Raises:
        AdapterConfigError: If the rule or an option is unknown, or an option is out of range.

    Examples:
        >>> import torch
        >>> up, down = ({"q.lora_A.weight": s * torch.ones(1, 2), "q.lora_B.weight": s * torch.ones(2, 1)} for s in (1, -1))
        >>> round_ = average([ClientUpdate("a", up), ClientUpdate("b", down)], expected=up)
        >>> (round_.tensors["q.lora_B.weight"] @ round_.tensors["q.lora_A.weight"]).round(decimals=4)
        tensor([[1., 1.],
                [1., 1.]])
    """
    row = find_averaging_rule(rule)
    if rule == "seeds" and options:
        raise AdapterConfigError(f"{', '.join(options)} is not an option of rule='seeds', which takes none.")
    known = {key: tensor for key, tensor in expected.items() if f".{RESIDUE}_" not in key}
    used, left_out = keep_usable(updates, expected=known, equal_ranks=row.equal_ranks, base=base)
    received = sum(update.n_bytes for update in updates)
    if rule == "seeds":
        odd = {update.name: reason for update in used if (reason := odd_steps(update, expected))}
        used, left_out = [update for update in used if update.name not in odd], left_out | odd
    if not used:
        return Averaged(tensors=dict(expected), used={}, left_out=left_out, bytes_received=received)
    total = sum(update.n_rows for update in used)
    weights = [update.n_rows / total for update in used]
    if rule == "seeds":
        named = {update.name: weight for update, weight in zip(used, weights, strict=True)}
        return Averaged(
            tensors=add_steps(expected, used, weights), used=named, left_out=left_out, bytes_received=received
        )
    tensors, errors = {}, {}
    pairs = {module: sides for module, sides in factor_keys(known).items() if len(sides) == 2}
    paired = {key for sides in pairs.values() for key in sides.values()}
    for key in known:
        if key not in paired:
            scaled = [_own_scale(update, key, scaling) * update.tensors[key].to(torch.float64) for update in used]
            mean = torch.stack([weight * each for weight, each in zip(weights, scaled, strict=True)]).sum(dim=0)
            tensors[key] = mean.to(known[key].dtype)
    combine = _COMBINE.get(rule, _merged)
    for module, sides in pairs.items():
        factors = [(u.scaling / scaling * u.tensors[sides[_B]], u.tensors[sides[_A]]) for u in used]
        wanted = len(known[sides[_A]]) if rank is None else rank
        try:
            lora_B, lora_A, lost, further = combine(factors, weights, rank=wanted, rule=rule, options=options)
        except (ValueError, TypeError) as error:
            raise AdapterConfigError(f"rule={rule!r} cannot average {module!r}: {error}") from error
        norm = float(torch.linalg.vector_norm(known[sides[_A]].float(), dim=1).mean())
        tensors[sides[_B]] = lora_B.to(known[sides[_B]].dtype).contiguous()
        tensors[sides[_A]] = fill_rows(lora_A, norm=norm or 1.0).to(known[sides[_A]].dtype).contiguous()
        errors[module] = lost
        if further is not None:
            tensors |= _accumulated(module, further, expected, scaling)
    order = [*expected, *(key for key in tensors if key not in expected)]
    return Averaged(
        tensors={key: tensors[key] for key in order},
        used={update.name: weight for update, weight in zip(used, weights, strict=True)},
        left_out=left_out,
        relative_errors=errors,
        bytes_received=received,
    )


Combined = tuple[Tensor, Tensor, float, Factors | None]


def _merged(factors: Sequence[Factors], weights: Sequence[float], *, rank: int, rule: str, options: Any) -> Combined:
    """A merging rule, truncated to a rank: `(lora_B, lora_A)`, the share of the norm lost, and nothing for the base."""
    rule = "task_arithmetic" if rule == "exact" else rule
    given = [weight * len(weights) for weight in weights] if RULES[rule].is_mean else weights
    merged = merge_updates(factors, rule=rule, weights=given, rank=rank, **options)
    measures = merged.measures
    lost = max(0.0, 1.0 - measures.kept_squared_norm / measures.squared_norm) ** 0.5 if measures.squared_norm else 0.0
    return merged.lora_B, merged.lora_A, lost, None


def _factor_means(
    factors: Sequence[Factors], weights: Sequence[float], *, rank: int, rule: str, options: Any
) -> Combined:
    """FedIT and FedEx-LoRA: the mean of the factors, and what the updates' mean has besides."""
    _no_options(rule, options)
    lora_B, lora_A = mean_of_factors(factors, weights=weights)
    rest = residual_of_factor_mean(factors, weights=weights)
    if rule == "fedex":
        return lora_B, lora_A, 0.0, rest
    whole = float(frobenius_norm(torch.cat([rest[0], lora_B], dim=1), torch.cat([rest[1], lora_A])))
    return lora_B, lora_A, float(frobenius_norm(*rest)) / whole if whole else 0.0, None


def _no_options(rule: str, options: Mapping[str, Any]) -> None:
    if options:
        raise ValueError(f"{', '.join(options)} is not an option of rule={rule!r}, which takes none")


_COMBINE: dict[str, Callable[..., Combined]] = {"fedit": _factor_means, "fedex": _factor_means}


def _own_scale(update: ClientUpdate, key: str, scaling: float) -> float:
    """What a tensor is multiplied by so that it means the same under the server's scaling: a lone B or core is scaled."""
    is_scaled = any(sides.get(_B) == key for sides in factor_keys([key]).values())
    return update.scaling / scaling if is_scaled else 1.0


def _accumulated(module: str, further: Factors, expected: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The residual of all rounds so far as factors of the rank that it has, the scaling inside."""
    left, right = further[0] * scaling, further[1]
    keys = [f"{module}.{RESIDUE}_{side}" for side in "BA"]
    if keys[0] in expected:
        left = torch.cat([expected[keys[0]].to(left.dtype), left], dim=1)
        right = torch.cat([expected[keys[1]].to(right.dtype), right])
    rank = min(left.shape[1], len(left), right.shape[1])
    kept = truncate(left, right, rank=rank)
    alive = max(1, int((torch.linalg.vector_norm(kept[1], dim=1) > 1e-7 * float(kept[1].norm())).sum()))
    return {keys[0]: kept[0][:, :alive].float().contiguous(), keys[1]: kept[1][:alive].float().contiguous()}
