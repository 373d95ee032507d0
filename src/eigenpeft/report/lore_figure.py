"""Figure of a LoRe evaluation: does its user's history help, and are the probabilities what they say."""

from pathlib import Path

from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.reward.evaluation.evaluate import LoReEvaluation


def check_plots() -> None:
    """Refuse before anything long is computed for a figure that cannot be drawn.

    Raises:
        EigenPeftError: If matplotlib is not installed.
    """
    new_figure(1, 1, width=1, height=1)


def plot_evaluation(found: LoReEvaluation, out_file: str | Path, *, overwrite: bool = False) -> None:
    """Draw the few-shot curve with its intervals, and the calibration of the Bradley-Terry probabilities.

    Args:
        found: From `evaluate_lore`.
        out_file: PNG file to write.
        overwrite: Whether to replace a file of that name.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If the file exists or cannot be written.
    """
    held_out, found = found.held_out, found.best_personal or found
    named = {method: f"{method}, basis of {found.n_basis}" if method == "LoRe" else method for method in found.accuracy}
    figure, (curve, reliability) = new_figure(1, 2, width=10, height=4.2)
    colors: dict[str, str] = {"LoRe": "tab:blue", "shared head": "tab:grey", "LoRe, population": "tab:orange"}
    for method, shares in found.few_shot.items():
        numbers = list(shares)
        curve.plot(
            numbers, [share.mean for share in shares.values()], marker="o", color=colors[method], label=named[method]
        )
        low, high = ([getattr(share, end) for share in shares.values()] for end in ("low", "high"))
        curve.fill_between(numbers, low, high, color=colors[method], alpha=0.15)
    curve.set_xscale("symlog", linthresh=1)
    ticks = [n for n in next(iter(found.few_shot.values()), {})]
    curve.set_xticks(ticks, [str(n) for n in ticks])
    curve.set(
        xlabel="comparisons a new user gave", ylabel="accuracy on new comparisons", title=f"New users, new {held_out}"
    )
    for method, bins in found.calibration.items():
        label = f"{named[method]} (error {bins.error:.3f})"
        reliability.plot(bins.confidence, bins.accuracy, marker="o", color=colors[method], label=label)
    reliability.plot([0.5, 1], [0.5, 1], color="black", linestyle=":", linewidth=1)
    reliability.set(xlabel="predicted probability of the likelier answer", ylabel="share that answered so")
    reliability.set_title(f"Calibration, new users, new {held_out}")
    for axes in (curve, reliability):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, out_file, overwrite=overwrite)
