"""From curves to words: is something shared, does it come from a seed, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

from eigenpeft.audit.report import Curve, Verdict

# How much more of an adapter than by chance the others must hold before that is worth the word "shared", as a share of
# ‖ΔW‖². A convention, not a law: what lies above chance and below this is reported with its numbers.
MARGIN = 0.25
# What relatives add is reported from this share of ‖ΔW‖² on, and from this part of the whole; what they add decides where less
# than this part of the excess over chance is left without them. Conventions too.
_TOLD, _TOLD_PART = 0.005, 0.1
_LEFT_WITHOUT_RELATIVES = 0.5
# A cluster's own subspace is advised where it holds this much more of an adapter left out.
_CLUSTER_GAIN = 0.02


@dataclass(frozen=True)
class Judgement:
    """A verdict and the sentences that go with it.

    Attributes:
        verdict: One of the names in `Verdict`.
        advice: What was measured, and what to do.
    """

    verdict: Verdict
    advice: str


@dataclass(frozen=True)
class HeldOutCurves:
    """What the verdict is read from, each beside its null.

    Attributes:
        together: Adapters of one group left out together, beside independent random adapters. Where all are one group, so
            that none can be left out with it: each alone, beside random adapters that share their input directions.
        alone: Each adapter left out alone, beside independent random adapters.
        alone_in: As `alone`, the input side projected alone.
        grouped: Whether any adapters share a start or a run; without, nothing can come from one.
        unrelated: As `together`, every adapter's relatives left out too; None where that changes nothing or leaves too few.
    """

    together: Curve
    alone: Curve
    alone_in: Curve
    grouped: bool
    unrelated: Curve | None = None


def judge(curves: HeldOutCurves, *, n_components: int) -> Judgement:
    """Compare held-out shares with their nulls at one K.

    Args:
        curves: Held-out shares of the collection and their nulls, by K.
        n_components: K.
    """
    index = n_components - 1
    decisive = curves.together
    real, null = decisive.real[index], decisive.null[index]
    numbers = f"with K = {n_components}, the others' subspace holds {real:.1%} of an adapter that it was not fitted to"
    if _above(decisive, index):
        if curves.unrelated is not None and _by_relatives(decisive, curves.unrelated, index):
            return Judgement(
                "shared only by related runs",
                f"What the adapters share, they share with their relatives: {numbers}, but {curves.unrelated.real[index]:.1%} "
                f"where every adapter related to it (cosine of ΔW above 0.2) is left out with it, and chance gives {null:.1%}. "
                "Adapters of other runs will not lie in this subspace: keep one adapter of each run and audit again.",
            )
        return Judgement(
            "shared",
            f"The adapters share a subspace: {numbers}, where chance gives {null:.1%}. {_relatives(curves, index)}Whether a new "
            "task trains well in it is another question: run the controls (a random subspace, a LoRA of equal parameters).",
        )
    # A common start shows where K is about one adapter's rank, which need not be where strangers' shares stop growing.
    at = max(range(len(curves.alone_in.real)), key=lambda i: curves.alone_in.real[i] - curves.alone_in.null_high[i])
    if curves.grouped and (_above(curves.alone, index) or _above(curves.alone_in, at)):
        side = curves.alone_in.real[at]
        return Judgement(
            "shared only through a common seed",
            f"What the adapters share comes from a common start or a common run, not from their tasks: {numbers}, and "
            f"{null:.1%} is what a common start alone, or chance, gives; counting the input side alone and adapters of the same "
            f"start in, it would look like {side:.1%} with K = {at + 1}. Adapters trained from other seeds will not lie in this "
            "subspace: train with other seeds, and keep one adapter of each run.",
        )
    surely = decisive.low[index] > decisive.null_high[index]
    excess = "That is surely more than chance, and far too little to stand in for an adapter. " if surely else ""
    return Judgement(
        "not shared",
        f"The adapters do not share a subspace: {numbers}, where chance gives {null:.1%}. {_relatives(curves, index)}{excess}"
        "There is nothing to recycle by projection; a new task may still train in this subspace, as it may in a random one: "
        "compare both. How to keep just these adapters in fewer numbers, Compress says.",
    )


def advice_on_clusters(clusters: Sequence[Sequence[str]], gain: float | None) -> str:
    """A sentence where one subspace per cluster holds more of its adapters than one for all; else nothing.

    Args:
        clusters: All adapters, by cluster.
        gain: Held-out share by the own cluster less that by all others; None where it was not measured.
    """
    if gain is None or gain < _CLUSTER_GAIN:
        return ""
    parts = "; ".join(", ".join(part) for part in clusters if len(part) >= 3)
    return (
        f" The adapters form clusters ({parts}), and a subspace of its own cluster holds {gain:.1%} more of an adapter than "
        "one of all: build one subspace per cluster."
    )


def _relatives(curves: HeldOutCurves, index: int) -> str:
    """A sentence where relatives hold shares of each other; else nothing."""
    if curves.unrelated is None:
        return ""
    with_them, without = curves.together.real[index], curves.unrelated.real[index]
    if with_them - without < max(_TOLD, _TOLD_PART * with_them):
        return ""
    return (
        f"Part of that is related adapters (cosine of ΔW above 0.2) that hold shares of each other: of an adapter left out "
        f"with its relatives, {without:.1%} is held. "
    )


def _by_relatives(together: Curve, unrelated: Curve, index: int) -> bool:
    excess, left = together.real[index] - together.null[index], unrelated.real[index] - unrelated.null[index]
    return not _above(unrelated, index) and left < _LEFT_WITHOUT_RELATIVES * excess


def _above(curve: Curve, index: int) -> bool:
    return curve.low[index] > curve.null_high[index] and curve.real[index] > curve.null[index] + MARGIN
