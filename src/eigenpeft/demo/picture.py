"""The demo's picture: what each method reached, and what the adapters share beside chance."""

from pathlib import Path
from statistics import fmean

from eigenpeft.audit import AuditReport
from eigenpeft.demo.methods import OURS
from eigenpeft.demo.result import DemoResult
from eigenpeft.linalg.scores.intervals import share_error
from eigenpeft.report.plots import new_figure, save_figure


def draw(result: DemoResult, audit: AuditReport, out_file: Path, *, overwrite: bool) -> None:
    """Write the picture.

    Args:
        result: What the demo found.
        audit: Audit of the related adapters.
        out_file: PNG file.
        overwrite: Whether to replace an earlier one.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If a file is there and `overwrite` is False, or the place cannot be written.
    """
    figure, (left, right) = new_figure(1, 2, width=12, height=4.4)
    for place, row in enumerate(reversed(result.rows)):
        mean = fmean(row.accuracies)
        error = 2 * share_error(mean, result.n_test)
        color = "tab:red" if row.method == OURS else "tab:grey"
        left.errorbar(mean, place, xerr=error, marker="o", capsize=3, color=color)
    labels = [f"{row.method}\n{row.n_parameters:,} numbers" for row in reversed(result.rows)]
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.set(
        xlabel="accuracy and twice its standard error", title=f"{result.n_customers} customers no adapter has seen"
    )
    steps = range(1, len(audit.held_out.real) + 1)
    right.plot(steps, audit.held_out.real, color="tab:red", label="sixteen related adapters")
    right.plot(steps, audit.held_out.null, color="tab:grey", linestyle="--", label="random adapters of their sizes")
    right.set(xlabel="components K", ylabel="share of an adapter's ‖ΔW‖²")
    right.set_ylim(bottom=0)
    right.set_title("What a subspace of the others holds of an adapter")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, out_file, overwrite=overwrite)
