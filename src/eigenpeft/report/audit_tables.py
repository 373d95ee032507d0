"""An audit as rich tables for a terminal."""

import shlex
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from eigenpeft.audit import AuditReport, GradientShare, Sharing
from eigenpeft.audit.answers import CORE_NAMES
from eigenpeft.report.markup import escape

_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NEAREST = 5
_TYPED = 200  # characters of a command line that are repeated


def answers_text(report: AuditReport, *, adapters: Sequence[str] = ()) -> Group:
    """The three answers, question by question, each with its table where there is one.

    Args:
        report: From `audit_adapters`.
        adapters: What was audited as it was typed, for the commands in the answers; without it they say ADAPTERS.
    """
    typed = shlex.join(adapters)
    typed = typed if 0 < len(typed) <= _TYPED else "ADAPTERS"
    parts: list[RenderableType] = []
    tables = (compress_table(report), train_table(report), reuse_table(report))
    for (question, _, text), table in zip(report.answers, tables, strict=True):
        told = text.replace("ADAPTERS", typed)
        parts += [f"[bold]{escape(question)}[/bold]", escape(told), *([table] if table is not None else []), ""]
    return Group(*parts)


def compress_table(report: AuditReport) -> Table:
    """Error against numbers per adapter.

    Args:
        report: From `audit_adapters`.
    """
    table = Table()
    table.add_column("core")
    for title in ("K", "numbers per adapter", "‖ΔW‖² kept", "error", "size beside plain LoRAs"):
        table.add_column(title, justify="right")
    for row in report.compress.rows:
        cells = (f"{row.n_parameters:,}", f"{row.kept_share:.1%}", f"{row.relative_error:.1%}", f"{row.ratio:.0%}")
        table.add_row(CORE_NAMES[row.core], str(row.n_components), *cells)
    table.add_row("LoRA", "", f"{report.compress.n_lora_parameters:,}", "100.0%", "0.0%", "100%")
    return table


def train_table(report: AuditReport) -> Table:
    """The probability of each event, beside how often it happened in the calibration.

    Args:
        report: From `audit_adapters`.
    """
    table = Table()
    table.add_column(f"event, {report.train.n_rows} training rows")
    for title in ("probability", "how often in the calibration", "mean gain, points", "predictable"):
        table.add_column(title, justify="right")
    for chance in report.train.chances:
        probability = "unknown" if chance.probability is None else f"{chance.probability:.0%}"
        table.add_row(
            escape(chance.event),
            probability,
            f"{chance.base_rate:.0%}",
            f"{chance.points[0]:+.1f} ± {chance.points[1]:.1f}",
            "yes" if chance.predicted else "no",
        )
    return table


def reuse_table(report: AuditReport) -> Table | None:
    """The nearest adapters; None where no rows of a task were given.

    Args:
        report: From `audit_adapters`.
    """
    if not report.reuse.nearest:
        return None
    table = Table()
    table.add_column("adapter")
    table.add_column("cosine with the negative gradient", justify="right")
    for name, cosine in report.reuse.nearest[:_NEAREST]:
        table.add_row(escape(name), f"{cosine:+.4f}")
    if report.reuse.chance is not None:
        table.add_row("best of as many random updates, once in 20 draws", f"{report.reuse.chance:+.4f}")
    return table


def share_table(report: AuditReport) -> Table:
    """Explained and held-out shares for several K, each beside its null.

    Args:
        report: From `audit_adapters`.
    """
    table = Table(title=f"Share of ‖ΔW‖², mean over {len(report.modules)} modules, {len(report.adapters)} adapters")
    table.add_column("K", justify="right")
    without = report.held_out_unrelated
    titles = ("explained", "by chance", "held out", "90 % interval", "by chance ")
    for title in (*titles, "without relatives") if without is not None else titles:
        table.add_column(title, justify="right")
    most = len(report.held_out.real)
    for n_components in sorted({*(size for size in _SHOWN if size <= most), report.n_components, most}):
        i, held_out = n_components - 1, report.held_out
        table.add_row(
            f"{n_components} ←" if n_components == report.n_components else str(n_components),
            f"{report.explained.real[i]:.3f}",
            f"{report.explained.null[i]:.3f}",
            f"{held_out.real[i]:.3f}",
            f"{held_out.low[i]:.3f} to {held_out.high[i]:.3f}",
            f"{held_out.null[i]:.3f}",
            *([f"{without.real[i]:.3f}"] if without is not None else []),
        )
    return table


def unshared_table(report: AuditReport) -> Table:
    """How much of each adapter the others do not hold, farthest first.

    Args:
        report: From `audit_adapters`.
    """
    table = Table(title=f"What the others do not share, K = {report.n_components}")
    table.add_column("adapter")
    table.add_column("unshared part of ‖ΔW‖²", justify="right")
    for name, share in sorted(report.unshared.items(), key=lambda item: -item[1]):
        table.add_row(escape(name), f"{share:.3f}")
    return table


def gradient_table(found: GradientShare) -> Table:
    """The share of a new task's gradient in the first K components of every module, beside random and best ones.

    Args:
        found: `report.gradient`, or from `gradient_share` with at least one seed.
    """
    table = Table(title=f"Share of the new task's gradient, {len(found.modules)} modules, {found.n_batches} batches")
    for title in ("K", "these adapters", f"random, mean of {len(found.random)}", "best of that size"):
        table.add_column(title, justify="right")
    most = len(found.curve)
    for n_components in sorted({*(size for size in _SHOWN if size <= most), most}):
        curves = (found.curve, found.random_curve, found.optimum_curve)
        table.add_row(str(n_components), *(f"{curve[n_components - 1]:.4f}" for curve in curves))
    return table


def sharing_table(found: Sharing) -> Table:
    """Held-out shares and bytes of shared banks beside a bank per module, each share with its null.

    Args:
        found: `report.sharing`.
    """
    table = Table(title=f"{found.n_banks} shared banks beside {found.n_modules}, held-out share of ‖ΔW‖²")
    for title in ("K", "own banks", "by chance", "shared", "by chance ", "cost", "90 % interval", "MB", "MB shared"):
        table.add_column(title, justify="right")
    for row in found.rows:
        shares = (row.own, row.own_null, row.shared, row.shared_null)
        table.add_row(
            str(row.n_components),
            *(f"{share:.3f}" for share in shares),
            f"{row.own - row.shared:+.3f}",
            f"{row.low:+.3f} to {row.high:+.3f}",
            f"{row.own_bytes / 1e6:.2f}",
            f"{row.shared_bytes / 1e6:.2f}",
        )
    return table
