"""From curves to words: is something shared, does it come from a seed, and what to do."""

from dataclasses import dataclass

from eigenpeft.auditing.report import Curve, Verdict

# How much more of an adapter than by chance the others must hold before that is worth the word "shared", as a share of
# ‖ΔW‖². A convention, not a law: what lies above chance and below this is told with its numbers.
MARGIN = 0.25
# The number of components is the smallest that reaches this part of the largest held-out share.
SATURATED = 0.95


@dataclass(frozen=True)
class Judgement:
    """A verdict and the sentences that go with it."""

    verdict: Verdict
    advice: str


def choose_n_components(curve: tuple[float, ...]) -> int:
    """The smallest K whose held-out share is at least 95 % of the largest one.

    Args:
        curve: Shares for K = 1, 2, ...

    Example:
        >>> choose_n_components((0.3, 0.6, 0.89, 0.9, 0.91))
        3
    """
    return next(k for k, share in enumerate(curve, start=1) if share >= SATURATED * max(curve))


@dataclass(frozen=True)
class HeldOutCurves:
    """What the verdict is read from, each beside its null.

    Attributes:
        together: Adapters of one group left out together, beside independent random adapters. Where all are one group, so
            that none can be left out with it: each alone, beside random adapters that share their input directions.
        alone: Each adapter left out alone, beside independent random adapters.
        alone_in: As `alone`, the input side projected alone.
    """

    together: Curve
    alone: Curve
    alone_in: Curve


def judge(curves: HeldOutCurves, *, n_components: int) -> Judgement:
    """Compare held-out shares with their nulls at one K.

    Args:
        curves: Of the collection.
        n_components: K.
    """
    k = n_components - 1
    decisive = curves.together
    real, null = decisive.real[k], decisive.null[k]
    numbers = f"with K = {n_components}, the others' subspace holds {real:.1%} of an adapter that it was not fitted to"
    if _above(decisive, k):
        return Judgement(
            "shared",
            f"The adapters share a subspace: {numbers}, where chance gives {null:.1%}. Whether a new task trains well in it is "
            "another question: run the controls (a random subspace, a LoRA of equal parameters).",
        )
    if _above(curves.alone, k) or _above(curves.alone_in, k):
        side = curves.alone_in.real[k]
        return Judgement(
            "shared only through a common seed",
            f"What the adapters share comes from a common start or a common run, not from their tasks: {numbers}, and "
            f"{null:.1%} is what a common start alone, or chance, gives; counting the input side alone and adapters of the same "
            f"start in, it would look like {side:.1%}. Adapters trained from other seeds will not lie in this subspace: "
            "train with other seeds, and keep one adapter of each run.",
        )
    surely = decisive.low[k] > decisive.null_high[k]
    excess = "That is surely more than chance, and far too little to stand in for an adapter. " if surely else ""
    return Judgement(
        "not shared",
        f"The adapters do not share a subspace: {numbers}, where chance gives {null:.1%}. {excess}There is nothing to recycle "
        "by projection; a new task may still train in this subspace, as it may in a random one: compare both. To compress "
        "just these adapters, use 'hooi' with as many components as they need.",
    )


def _above(curve: Curve, k: int) -> bool:
    return curve.low[k] > curve.null_high[k] and curve.real[k] > curve.null[k] + MARGIN
