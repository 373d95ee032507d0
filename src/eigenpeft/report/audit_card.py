"""An audit as a section of a model card."""

from eigenpeft.artifacts.plain_text import for_card
from eigenpeft.audit import AuditReport
from eigenpeft.audit.answers import CORE_NAMES

AUDIT_FIGURE = "audit.png"
_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def audit_section(report: AuditReport) -> str:
    """Markdown: the three answers, shares beside chance, the figure by its name beside the card, what was noticed.

    Args:
        report: From `audit_adapters`.
    """
    held_out, explained = report.held_out, report.explained
    most = len(held_out.real)
    rows = [
        f"| {n_components} | {explained.real[at]:.3f} | {explained.null[at]:.3f} | {held_out.real[at]:.3f} | "
        f"{held_out.low[at]:.3f} to {held_out.high[at]:.3f} | {held_out.null[at]:.3f} |"
        for n_components in sorted({*(size for size in _SHOWN if size <= most), report.n_components, most})
        for at in [n_components - 1]
    ]
    answers = "\n\n".join(f"**{question}** {for_card(text)}" for question, _, text in report.answers)
    compressed = "\n".join(
        f"| {CORE_NAMES[row.core]} | {row.n_components} | {row.n_parameters:,} | {row.kept_share:.1%} | {row.relative_error:.1%} "
        f"| {row.ratio:.0%} |"
        for row in report.compress.rows
    )
    noticed = "\n".join(f"- {for_card(finding.message)}" for finding in report.findings) or "- nothing"
    return f"""## What can be done with these adapters?

{answers}

| core | K | numbers per adapter | ‖ΔW‖² kept | error | size beside plain LoRAs |
|---|---|---|---|---|---|
{compressed}

### How much they share

A detail: {for_card(report.verdict)}. {for_card(report.advice)}

Measured by `eigenpeft audit` on {len(report.adapters)} adapters and {len(report.modules)} modules, weights alone. Explained:
of the adapters that the components were fitted to. Held out: of an adapter, by components fitted to the others. By
chance: random adapters of the same sizes and singular values. Shares of ‖ΔW‖².

| K | explained | by chance | held out | 90 % interval | by chance |
|---|---|---|---|---|---|
{chr(10).join(rows)}

![The three answers, held-out share, held-out share by module, similarity of the adapters]({AUDIT_FIGURE})

Noticed about the adapters:

{noticed}
"""
