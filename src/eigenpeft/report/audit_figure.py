"""An audit as one figure, and as one self-contained HTML page."""

import base64
import io
import re
import textwrap
from html import escape
from pathlib import Path

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.audit import AuditReport, Curve
from eigenpeft.audit.answers import CORE_NAMES, CompressRow
from eigenpeft.report.plots import new_figure, save_figure

_LAYER = re.compile(r"\.(\d+)\.")
_NEAREST = 5


def plot_audit(report: AuditReport, out_file: str | Path, *, overwrite: bool = False) -> None:
    """Draw the three answers, the held-out share with its null and by layer, and the adapters' similarity.

    Args:
        report: From `audit_adapters`.
        out_file: PNG file to write.
        overwrite: Whether to replace a file of that name.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If the file exists or cannot be written.
    """
    save_figure(_figure(report), out_file, overwrite=overwrite)


def audit_png(report: AuditReport) -> bytes:
    """The figure of `plot_audit` as the bytes of a PNG file.

    Args:
        report: From `audit_adapters`.

    Raises:
        EigenPeftError: If matplotlib is not installed.
    """
    image = io.BytesIO()
    _figure(report).savefig(image, format="png", dpi=130)
    return image.getvalue()


def write_page(report: AuditReport, out_file: str | Path, *, overwrite: bool = False) -> None:
    """Write the three answers, the figure and the numbers as one HTML file that needs nothing else.

    Args:
        report: From `audit_adapters`.
        out_file: HTML file to write, whole or not at all.
        overwrite: Whether to replace a file of that name.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If the file exists or cannot be written.
    """
    picture = base64.b64encode(audit_png(report)).decode()
    findings = "".join(
        f"<li><b>{escape(f.kind.replace('_', ' '))}</b>: {_html(f.message)}</li>" for f in report.findings
    )
    held_out, at = report.held_out, report.n_components - 1
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{module.n_adapters}</td><td>{module.effective_rank_in:.1f} "
        f"({module.null_effective_rank_in:.1f})</td><td>{module.effective_rank_out:.1f} "
        f"({module.null_effective_rank_out:.1f})</td><td>{module.held_out.real[at]:.3f} ({module.held_out.null[at]:.3f})</td></tr>"
        for name, module in report.modules.items()
    )
    unshared = "".join(
        f"<tr><td>{escape(name)}</td><td>{share:.3f}</td></tr>"
        for name, share in sorted(report.unshared.items(), key=lambda item: -item[1])
    )
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit of {len(report.adapters)} adapters</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}}img{{max-width:100%}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left}}</style>
<h1>What can be done with these {len(report.adapters)} adapters?</h1>
{_answers(report)}
<img alt="The three answers, held-out shares, heat map and similarity matrix" src="data:image/png;base64,{picture}">
<h2>How much they share</h2><p>A detail: {escape(report.verdict)}. {_html(report.advice)}</p>
<p>{len(report.adapters)} adapters, {len(report.modules)} modules. Held-out share at K = {report.n_components}:
{held_out.real[at]:.3f} (90 % interval {held_out.low[at]:.3f} to {held_out.high[at]:.3f}), by chance {held_out.null[at]:.3f}.</p>
<h2>Noticed</h2><ul>{findings or "<li>nothing</li>"}</ul>
{_gradient(report)}{_sharing(report)}
<h2>What the others do not share</h2><table><tr><th>adapter</th><th>unshared part of ‖ΔW‖²</th></tr>{unshared}</table>
<h2>Modules</h2><p>In parentheses: random adapters of the same sizes.</p><table><tr><th>module</th><th>adapters</th>
<th>effective rank in</th><th>effective rank out</th><th>held-out share</th></tr>{rows}</table></html>
"""
    with atomic_file(out_file, overwrite=overwrite) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _html(text: str) -> str:
    """A sentence for the page: what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _answers(report: AuditReport) -> str:
    """One section per answer: question, words, table."""
    compress = "".join(
        f"<tr><td>{CORE_NAMES[row.core]}</td><td>{row.n_components}</td><td>{row.n_parameters:,}</td><td>{row.relative_error:.1%}</td><td>{row.ratio:.0%}</td></tr>"
        for row in report.compress.rows
    )
    train = "".join(
        f"<tr><td>{escape(chance.event)}</td><td>"
        f"{'unknown' if chance.probability is None else format(chance.probability, '.0%')}</td>"
        f"<td>{chance.base_rate:.0%}</td><td>{chance.points[0]:+.1f} ± {chance.points[1]:.1f}</td></tr>"
        for chance in report.train.chances
    )
    reuse = "".join(
        f"<tr><td>{escape(name)}</td><td>{cosine:+.4f}</td></tr>" for name, cosine in report.reuse.nearest[:_NEAREST]
    )
    tables = (
        f"<tr><th>core</th><th>K</th><th>numbers per adapter</th><th>error</th><th>size beside plain LoRAs</th></tr>{compress}",
        f"<tr><th>event, {report.train.n_rows} training rows</th><th>probability</th><th>how often in the calibration</th>"
        "<th>mean gain there, points of accuracy</th></tr>"
        f"{train}",
        f"<tr><th>adapter</th><th>cosine with the negative gradient</th></tr>{reuse}" if reuse else "",
    )
    return "\n".join(
        f'<section id="{question.partition(":")[0].lower()}"><h2>{escape(question)}</h2><p>{_html(text)}</p>'
        f"{f'<table>{table}</table>' if table else ''}</section>"
        for (question, _, text), table in zip(report.answers, tables, strict=True)
    )


def _gradient(report: AuditReport) -> str:
    """The section on a new task's gradient, by module; nothing where no task was given."""
    if report.gradient is None:
        return ""
    rows = "".join(
        f"<tr><td>{escape(module.module)}</td><td>{module.share:.4f}</td><td>{max(module.random):.4f}</td>"
        f"<td>{module.optimum:.4f}</td><td>{module.diagonal:.4f}</td></tr>"
        for module in report.gradient.modules
    )
    return (
        "<h2>The new task's gradient, before any training</h2><table><tr><th>module</th><th>share inside</th>"
        f"<th>highest random</th><th>best of that size</th><th>core diagonal</th></tr>{rows}</table>"
    )


def _sharing(report: AuditReport) -> str:
    """The section on banks that modules share; nothing where it was not asked for."""
    if report.sharing is None:
        return ""
    rows = "".join(
        f"<tr><td>{row.n_components}</td><td>{row.own:.3f} ({row.own_null:.3f})</td><td>{row.shared:.3f} "
        f"({row.shared_null:.3f})</td><td>{row.own - row.shared:+.3f} ({row.low:+.3f} to {row.high:+.3f})</td>"
        f"<td>{row.own_bytes / 1e6:.2f}</td><td>{row.shared_bytes / 1e6:.2f}</td></tr>"
        for row in report.sharing.rows
    )
    return (
        f"<h2>Banks that layers share</h2><p>{_html(report.sharing.text)}</p><p>In parentheses: random adapters of the same "
        "sizes; for the cost its 90 % interval.</p><table><tr><th>K</th><th>held-out share, a bank per module</th>"
        f"<th>shared banks</th><th>cost</th><th>MB</th><th>MB shared</th></tr>{rows}</table>"
    )


def _figure(report: AuditReport):
    figure, ((compress, train, reuse), (held_out, heat, similarity)) = new_figure(2, 3, width=17.0, height=9.5)
    _compress(compress, report)
    _train(train, report)
    _reuse(reuse, report)
    _curves(held_out, report.held_out, "Held out: share of an adapter in the others' subspace")
    if report.held_out_unrelated is not None:
        without = report.held_out_unrelated.real
        held_out.plot(range(1, len(without) + 1), without, color="tab:green", linestyle="-.", label="without relatives")
        held_out.legend(loc="upper left", fontsize=8)
    held_out.axvline(report.n_components, color="tab:grey", linewidth=0.8, linestyle=":")
    _heat_map(figure, heat, report)
    image = similarity.imshow(report.similarity, vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(image, ax=similarity, shrink=0.8)
    places = range(len(report.adapters))
    similarity.set_xticks(places, report.adapters, rotation=90, fontsize=7)
    similarity.set_yticks(places, report.adapters, fontsize=7)
    similarity.set_title("Mean cosine of ΔW")
    figure.suptitle(f"What can be done with these {len(report.adapters)} adapters?")
    return figure


# Colour, label, and what the number at a point is, by the core of a row of the first answer.
_SERIES = {
    "full": ("tab:blue", "core full", "K"),
    "diagonal": ("tab:orange", "core paired", "K"),
    "truncated": ("tab:grey", "each LoRA cut to a lower rank", "r"),
}


def _compress(axes, report: AuditReport) -> None:
    rows = report.compress.rows
    by_core: dict[str, list[CompressRow]] = {}
    for row in rows:
        by_core.setdefault(row.core, []).append(row)
    for core, (color, label, _) in _SERIES.items():
        own = by_core.get(core, [])
        axes.plot(
            [row.n_parameters for row in own], [row.relative_error for row in own], color=color, marker="o", label=label
        )
    for row in rows:
        axes.annotate(
            f"{_SERIES[row.core][2]} {row.n_components}",
            (row.n_parameters, row.relative_error),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.axvline(report.compress.n_lora_parameters, color="tab:grey", linestyle=":", label="one plain LoRA")
    axes.set(xlabel="numbers per adapter", ylabel="error of ΔW", xscale="log", ylim=(0, 1.02))
    axes.set_title(f"Compress: {report.compress.answer}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _train(axes, report: AuditReport) -> None:
    chances = report.train.chances[::-1]
    places = range(len(chances))
    axes.barh(places, [chance.probability or 0.0 for chance in chances], color="tab:blue", label="here")
    rates = [chance.base_rate for chance in chances]
    axes.plot(rates, places, linestyle="none", marker="d", color="tab:orange", label="how often in the calibration")
    axes.set_yticks(places, [textwrap.fill(chance.event, 28) for chance in chances], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="probability", title=f"Train, {report.train.n_rows} rows: {report.train.answer}")
    axes.legend(fontsize=8, loc="lower right")


def _reuse(axes, report: AuditReport) -> None:
    axes.set_title(f"Reuse: {report.reuse.answer}")
    nearest = report.reuse.nearest[:_NEAREST][::-1]
    if not nearest:
        axes.text(0.5, 0.5, "no rows of a task were given", ha="center", va="center", fontsize=10, color="tab:grey")
        axes.set_axis_off()
        return
    axes.barh(range(len(nearest)), [cosine for _, cosine in nearest], color="tab:blue")
    axes.set_yticks(range(len(nearest)), [name for name, _ in nearest], fontsize=8)
    axes.set(xlabel="cosine of the update with the negative gradient")


def _curves(axes, curve: Curve, title: str) -> None:
    steps = range(1, len(curve.real) + 1)
    axes.plot(steps, curve.real, color="tab:blue", label="these adapters")
    axes.fill_between(steps, curve.low, curve.high, color="tab:blue", alpha=0.2, linewidth=0)
    axes.plot(steps, curve.null, color="tab:orange", linestyle="--", label="random adapters of the same sizes")
    axes.set(xlabel="components K", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02), title=title)
    axes.legend(loc="upper left" if max(curve.real) < 0.7 else "lower right", fontsize=8)
    axes.grid(alpha=0.3)


def _heat_map(figure, axes, report: AuditReport) -> None:
    """Held-out share by kind of module and layer; modules without a number in their name are one column."""
    at = report.n_components - 1
    cells: dict[str, dict[int, float]] = {}
    for name, module in report.modules.items():
        found = _LAYER.search(f".{name}.")
        layer, kind = (int(found[1]), _LAYER.sub(".*.", f".{name}.", count=1).strip(".")) if found else (0, name)
        cells.setdefault(kind, {})[layer] = module.held_out.real[at]
    layers = sorted({layer for row in cells.values() for layer in row})
    grid = [[row.get(layer, float("nan")) for layer in layers] for row in cells.values()]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xticks(range(len(layers)), layers, fontsize=7)
    axes.set_yticks(range(len(cells)), [kind.rpartition("*.")[2] for kind in cells], fontsize=8)
    axes.set(xlabel="layer", title=f"Held-out share by module, K = {report.n_components}")
