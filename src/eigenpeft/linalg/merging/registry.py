"""The merging rules by name: the function, where it comes from, what it needs, and how it is applied to factors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import weighted
from eigenpeft.linalg.rules.boosting import boosting
from eigenpeft.linalg.rules.compress import compress_then_merge
from eigenpeft.linalg.rules.dare import dare, dare_ties
from eigenpeft.linalg.rules.isotropic import iso_c, iso_cts
from eigenpeft.linalg.rules.knots import knots
from eigenpeft.linalg.rules.pico import pico
from eigenpeft.linalg.rules.regmean import regmean
from eigenpeft.linalg.rules.sums import mean, task_arithmetic
from eigenpeft.linalg.rules.svc import svc
from eigenpeft.linalg.rules.ties import ties
from eigenpeft.linalg.rules.tsv import tsv
from eigenpeft.linalg.rules.wudi import wudi

CALIBRATIONS = ("pico", "svc")
"""What can be put around any rule: Pico before it, SVC after it."""


@dataclass(frozen=True)
class Rule:
    """One way to merge updates.

    Attributes:
        merge: Function of `(cores, weights=..., **options)`.
        title: Its name in the literature.
        paper: Where it comes from.
        options: Further arguments that a user may set, with their defaults.
        needs: What must be passed besides: "statistics" of each task's inputs, "seeds" of random draws.
        model_inputs: Whether the rule is defined on the model's own input coordinates (see `with_model_inputs`).
        calibrations: What is put around the function to make the published method.
        scale: Final multiplier λ of the published method; "auto" for Pico's rule of the norm.
        is_mean: Whether the result is a mean over the updates, or measured against their mean, and not a sum of them: weights
            of mean 1 then leave updates that agree as they are, where a sum needs weights of sum 1.
    """

    merge: Callable[..., Tensor]
    _: KW_ONLY
    title: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    model_inputs: bool = False
    calibrations: tuple[str, ...] = ()
    scale: float | str = 1.0
    is_mean: bool = False


_TIES = {"density": 0.2, "agreement": "mean"}
_SEEDS = frozenset({"seeds"})

RULES: dict[str, Rule] = {
    "task_arithmetic": Rule(task_arithmetic, title="Task arithmetic", paper="arXiv 2212.04089"),
    "mean": Rule(mean, title="Mean of the updates", paper="arXiv 2203.05482"),
    "ties": Rule(ties, title="TIES", paper="arXiv 2306.01708", options=_TIES, is_mean=True),
    "dare": Rule(dare, title="DARE", paper="arXiv 2311.03099", options={"drop": 0.5}, needs=_SEEDS),
    "dare_ties": Rule(
        dare_ties,
        title="DARE-TIES",
        paper="arXiv 2311.03099",
        options={"drop": 0.5, "agreement": "mean"},
        needs=_SEEDS,
        is_mean=True,
    ),
    "knots": Rule(knots, title="KnOTS-TIES", paper="arXiv 2410.19735", options=_TIES, model_inputs=True, is_mean=True),
    "tsv": Rule(tsv, title="TSV-M", paper="arXiv 2412.00081"),
    "iso_c": Rule(iso_c, title="Iso-C", paper="arXiv 2502.04959"),
    "iso_cts": Rule(iso_cts, title="Iso-CTS", paper="arXiv 2502.04959", options={"common_share": 0.8}),
    "boosting": Rule(boosting, title="Subspace Boosting", paper="arXiv 2506.16506", options={"beta": 0.01}),
    "svc": Rule(task_arithmetic, title="SVC", paper="arXiv 2602.05536", calibrations=("svc",), is_mean=True),
    "pico": Rule(
        task_arithmetic, title="Pico", paper="arXiv 2604.16826", calibrations=("pico",), scale="auto", is_mean=True
    ),
    "wudi": Rule(wudi, title="WUDI, closed form", paper="arXiv 2503.08099", options={"ridge": 1e-3}, is_mean=True),
    "regmean": Rule(
        regmean,
        title="RegMean",
        paper="arXiv 2212.09849",
        options={"shrink": 0.95, "ridge": 1e-4},
        needs=frozenset({"statistics"}),
    ),
    "compress": Rule(
        compress_then_merge,
        title="Compress-then-Merge",
        paper="arXiv 2606.03723",
        options={"n_components": 16, "beta": 0.25},
    ),
}
"""The rules of `merge_cores`, by the name a user passes as `rule`. A new rule is one file and one row."""


def find_rule(rule: str) -> Rule:
    """The rule of a name.

    Args:
        rule: Name in `RULES`.

    Raises:
        ValueError: If there is none; the message names all.

    Examples:
        >>> find_rule("ties").title
        'TIES'
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; pass one of {', '.join(map(repr, RULES))}.")
    return RULES[rule]


def check_options(rule: str, *, calibrate: Sequence[str] = (), **options: Any) -> None:
    """Check a rule's name and options before anything is read, by merging one number.

    Args:
        rule: Name in `RULES`.
        calibrate: As for `merge_cores`.
        **options: The rule's own, without `grams` and `seeds`.

    Raises:
        ValueError: As `merge_cores`.

    Examples:
        >>> check_options("ties", density=0.2)
        >>> check_options("ties", density=2.0)
        Traceback (most recent call last):
        ValueError: ...
    """
    number = torch.ones(1, 1, 1, dtype=torch.float64)
    needed = {"grams": number} if "statistics" in find_rule(rule).needs else {}
    merge_cores(number, rule=rule, calibrate=calibrate, **options, **needed)


def merge_cores(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    rule: str,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    calibrate: Sequence[str] = (),
    **options: Any,
) -> Float[Tensor, "k_out k_in"]:
    """Merge updates on common axes by any rule, with Pico before it or SVC after it where asked for.

    `M = after(rule(before(w_1 M_1), ..., before(w_T M_T)))`. Each rule is one function whose docstring has its equation;
    `RULES[rule].paper` and `CALIBRATIONS` name the papers.

    Args:
        cores: Updates on common axes: of `core_space`, or the cores of a store's members on one module. For a rule with
            `model_inputs`, those of `with_model_inputs`.
        weights: One number per update, which scales it; None for 1.
        rule: Name in `RULES`.
        calibrate: Names in `CALIBRATIONS`, besides the rule's own.
        **options: The rule's own: `RULES[rule].options`, and `grams` or `seeds` where it needs them.

    Returns:
        The merged update on the same axes, before λ.

    Raises:
        ValueError: If a name is unknown, an option is not the rule's, or a value is out of range.

    Example:
        >>> import torch
        >>> cores = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
        >>> merge_cores(cores, rule="iso_c")
        tensor([[3., 0.],
                [0., 3.]], dtype=torch.float64)
    """
    row = find_rule(rule)
    unknown = [name for name in calibrate if name not in CALIBRATIONS]
    if unknown:
        raise ValueError(f"calibrate={unknown} is unknown; pass some of {', '.join(map(repr, CALIBRATIONS))}.")
    allowed = {*row.options, *({"grams"} if "statistics" in row.needs else ()), *(row.needs & {"seeds"})}
    if foreign := sorted(set(options) - allowed):
        takes = ", ".join(sorted(allowed)) or "no options"
        raise ValueError(
            f"{foreign[0]}={options[foreign[0]]!r} is not an option of rule={rule!r}, which takes {takes}."
        )
    if "statistics" in row.needs and "grams" not in options:
        raise ValueError(f"rule={rule!r} needs statistics of each task's inputs; pass grams.")
    if not cores[0].numel():
        return cores.sum(dim=0)  # every update is zero
    wanted = {*calibrate, *row.calibrations}
    updates = pico(weighted(cores, weights)) if "pico" in wanted else cores
    merged = row.merge(updates, weights=None if "pico" in wanted else weights, **options)
    return svc(merged, weighted(cores, weights)) if "svc" in wanted else merged
