"""An audit as one figure, and as one self-contained HTML page."""

import base64
import io
import re
import tempfile
from html import escape
from pathlib import Path

from eigenpeft.audit import AuditReport, Curve
from eigenpeft.errors import ArtifactError
from eigenpeft.report.plots import new_figure, save_figure

_LAYER = re.compile(r"\.(\d+)\.")


def plot_audit(report: AuditReport, path: str | Path) -> None:
    """Draw explained and held-out shares with their nulls, the held-out share by layer, and the adapters' similarity.

    Args:
        report: From `audit`.
        path: PNG file to write.

    Raises:
        EigenPeftError: If matplotlib is not installed.
    """
    save_figure(_figure(report), path)


def audit_png(report: AuditReport) -> bytes:
    """The figure of `plot_audit` as the bytes of a PNG file.

    Args:
        report: From `audit`.

    Raises:
        EigenPeftError: If matplotlib is not installed.
    """
    image = io.BytesIO()
    _figure(report).savefig(image, format="png", dpi=130)
    return image.getvalue()


def write_page(report: AuditReport, path: str | Path) -> None:
    """Write the verdict, the figure and the numbers as one HTML file that needs nothing else.

    Args:
        report: From `audit`.
        path: HTML file to write, whole or not at all.

    Raises:
        EigenPeftError: If matplotlib is not installed.
        ArtifactError: If the file cannot be written.
    """
    picture = base64.b64encode(audit_png(report)).decode()
    findings = "".join(f"<li><b>{escape(f.kind)}</b> {escape(f.message)}</li>" for f in report.findings)
    held_out, k = report.held_out, report.n_components - 1
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{module.n_adapters}</td><td>{module.effective_rank_in:.1f} "
        f"({module.null_effective_rank_in:.1f})</td><td>{module.effective_rank_out:.1f} "
        f"({module.null_effective_rank_out:.1f})</td><td>{module.held_out.real[k]:.3f} ({module.held_out.null[k]:.3f})</td></tr>"
        for name, module in report.modules.items()
    )
    outside = "".join(
        f"<tr><td>{escape(name)}</td><td>{share:.3f}</td></tr>"
        for name, share in sorted(report.outside.items(), key=lambda item: -item[1])
    )
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit: {escape(report.verdict)}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}}img{{max-width:100%}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left}}</style>
<h1>Is there anything to recycle? {escape(report.verdict.capitalize())}.</h1><p>{escape(report.advice)}</p>
<p>{len(report.adapters)} adapters, {len(report.modules)} modules. Held-out share at K = {report.n_components}:
{held_out.real[k]:.3f} (90 % interval {held_out.low[k]:.3f} to {held_out.high[k]:.3f}), by chance {held_out.null[k]:.3f}.</p>
<img alt="Curves, heat map and similarity matrix" src="data:image/png;base64,{picture}">
<h2>Noticed</h2><ul>{findings or "<li>nothing</li>"}</ul>
{_gradient(report)}<h2>Outside what the others span</h2><table><tr><th>adapter</th><th>share</th></tr>{outside}</table>
<h2>Modules</h2><p>In parentheses: random adapters of the same sizes.</p><table><tr><th>module</th><th>adapters</th>
<th>effective rank in</th><th>effective rank out</th><th>held-out share</th></tr>{rows}</table></html>
"""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        raise ArtifactError(f"Cannot write {str(path)!r}: {error.strerror or error}. Choose another place.") from error


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


def _figure(report: AuditReport):
    figure, ((spectrum, held_out), (heat, similarity)) = new_figure(2, 2, width=12.5, height=9.5)
    _curves(spectrum, report.explained, "Explained: fitted to all of them")
    _curves(held_out, report.held_out, "Held out: fitted to the others")
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
    figure.suptitle(f"Audit of {len(report.adapters)} adapters: {report.verdict}")
    return figure


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
    k = report.n_components - 1
    cells: dict[str, dict[int, float]] = {}
    for name, module in report.modules.items():
        found = _LAYER.search(f".{name}.")
        layer, kind = (int(found[1]), _LAYER.sub(".*.", f".{name}.", count=1).strip(".")) if found else (0, name)
        cells.setdefault(kind, {})[layer] = module.held_out.real[k]
    layers = sorted({layer for row in cells.values() for layer in row})
    grid = [[row.get(layer, float("nan")) for layer in layers] for row in cells.values()]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xticks(range(len(layers)), layers, fontsize=7)
    axes.set_yticks(range(len(cells)), [kind.rpartition("*.")[2] for kind in cells], fontsize=8)
    axes.set(xlabel="layer", title=f"Held-out share by module, K = {report.n_components}")
