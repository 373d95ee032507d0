"""A merge as tables for a terminal: its sources, and what was tried to choose the multiplier."""

from rich.table import Table

from eigenpeft.combining import MergeReport
from eigenpeft.report.markup import escape


def merge_table(report: MergeReport) -> Table:
    """One row per source adapter.

    Args:
        report: Report of the merge.
    """
    low, high = report.scale_range
    scale = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    table = Table(
        title=f"{report.title} of {len(report.sources)} adapters: rank {report.rank}, {report.n_modules} modules, "
        f"multiplier {scale}",
        caption=f"Kept by the cut to rank {report.rank}: {report.kept_share:.2%} of the squared norm. Stable rank "
        f"{report.stable_rank:.2f}. Over-counting {report.over_counting:.2f} (1: as strong as the sources). Distance 0 is the "
        "source itself, 1 as far from it as the base model.",
    )
    table.add_column("adapter")
    for name in ("weight", "norm", "distance", "cosine to the others"):
        table.add_column(name, justify="right")
    for source in report.sources:
        table.add_row(
            escape(source.name),
            f"{source.weight:g}",
            f"{source.norm:.3g}",
            "untrained" if source.relative_distance is None else f"{source.relative_distance:.3f}",
            "" if source.cosine is None else f"{source.cosine:.3f}",
        )
    return table


def grid_table(report: MergeReport) -> Table:
    """The multipliers that were tried, with their scores.

    Args:
        report: Report of the merge.
    """
    table = Table(title="Multipliers tried on held-out rows")
    table.add_column("scale", justify="right")
    table.add_column("score", justify="right")
    for entry in report.grid:
        chosen = " <- kept" if entry["scale"] == report.scale else ""
        table.add_row(f"{entry['scale']:g}", f"{entry['score']:.4f}{chosen}")
    return table
