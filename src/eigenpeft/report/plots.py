"""Figures as PNG files; needs the extra `plots` (matplotlib)."""

from pathlib import Path

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.errors import EigenPeftError
from eigenpeft.subspace import PrincipalSubspace

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text
except ImportError:
    FigureCanvasAgg = Figure = Text = None


def plot_spectra(subspace: PrincipalSubspace, out_file: str | Path, *, overwrite: bool = False) -> None:
    """Draw explained share against K, and the singular values of both sides, one thin line per module.

    Args:
        subspace: What to draw.
        out_file: PNG file to write.
        overwrite: Whether to replace a file of that name.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If the file exists or cannot be written.
    """
    figure, (share, side_in, side_out) = new_figure(1, 3, width=13, height=4)
    for bank in subspace.values():
        n_principal = len(bank.explained_variance_ratio)
        steps = range(1, n_principal + 1)
        share.plot(steps, bank.explained_variance_ratio.double().cumsum(0), color="tab:blue", alpha=0.3, linewidth=0.9)
        for axes, values in ((side_in, bank.singular_values_in), (side_out, bank.singular_values_out)):
            axes.semilogy(steps, values / values[0], color="tab:blue", alpha=0.3, linewidth=0.9)
    share.set(xlabel="components K", ylabel="share of Σ‖ΔW‖² explained", ylim=(0, 1.02), title="Explained share")
    side_in.set(xlabel="component", ylabel="singular value / largest", title="Input side")
    side_out.set(xlabel="component", title="Output side")
    for axes in (share, side_in, side_out):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{len(subspace)} modules of {subspace.info.base_model_name_or_path}, {len(subspace.info.sources)} adapters, "
        f"method {subspace.info.method}, weighting {subspace.info.weighting}: one line per module"
    )
    save_figure(figure, out_file, overwrite=overwrite)


def save_figure(figure: "Figure", out_file: str | Path, *, overwrite: bool = False) -> None:  # pyright: ignore[reportInvalidTypeForm]
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: A matplotlib figure.
        out_file: PNG file to write.
        overwrite: Whether to replace a file of that name.

    Raises:
        ArtifactError: If the file exists or cannot be written.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names from files may hold "$", which would be read as a formula
    with atomic_file(out_file, overwrite=overwrite) as scratch:
        figure.savefig(scratch, format="png", dpi=130)


def new_figure(rows: int, columns: int, *, width: float, height: float):
    """A figure and its axes, without pyplot's global state or a display.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Inches.
        height: Inches.

    Raises:
        EigenPeftError: If matplotlib is not installed.
    """
    if Figure is None or FigureCanvasAgg is None:
        raise EigenPeftError("Plots need matplotlib, which is not installed: pip install 'eigenpeft[plots]'.")
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)
