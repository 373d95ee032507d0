"""The study's picture: differences to the controls, and the gradient's share against what training gained."""

from pathlib import Path

from compare import Cells, controls_of, difference
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(tables: dict[int, Cells], records: list[dict], path: Path) -> None:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    gaps, scatter = figure.subplots(1, 2, width_ratios=[1.5, 1])
    labels, place = [], 0
    for n_train, cells in tables.items():
        for method in cells:
            random, small = controls_of(method)
            bars = [
                (difference(cells, method, other), color)
                for other, color in ((random, "tab:blue"), (small, "tab:orange"))
            ]
            if not any(found for found, _ in bars):
                continue
            for (found, color), shift in zip(bars, (0.15, -0.15), strict=True):
                if found:
                    gaps.errorbar(found[0], place + shift, xerr=found[1], fmt="o", color=color, markersize=4, capsize=2)
            labels.append(f"{method}, {n_train} rows")
            place -= 1
    gaps.axvline(0, color="black", linewidth=0.8)
    gaps.set_yticks(range(0, place, -1), labels, fontsize=8)
    gaps.set(
        xlabel="accuracy less that of the control, 95 % interval", title="blue: random subspace, orange: small LoRA"
    )
    gaps.grid(axis="x", alpha=0.3)
    for target in sorted({record["target"] for record in records}):
        chosen = [record for record in records if record["target"] == target]
        scatter.semilogx([r["share"] for r in chosen], [r["gain"] for r in chosen], "o", markersize=4, label=target)
    scatter.set(xlabel="share of the gradient before training", ylabel="gain over the head after it")
    scatter.set_title("Does the gradient share predict?")
    scatter.legend(fontsize=8)
    scatter.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
