"""Tables and figure of the study's causal slice: held-out losses, paired differences, steps to LoRA's loss.

Command:  python benchmarks/study/causal_report.py [--docs docs/study.md]
Writes:   the tables as markdown, to stdout or between the marks of a page (as report.py does), and
          benchmarks/results/study/causal.png, from the cells that are there. Differences are paired by target and seed, their
          intervals 95 % (Student's t); below zero is better.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

from causal import METHODS, OURS, RESULTS, TARGETS, best_rate
from compare import Cells, difference, difference_by_target, shown
from encoder import read
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from report import filled

FULL = "LoRA r8"
FIGURE = RESULTS.with_name("causal.png")
NEARLY = 0.9  # of LoRA r8's gain over the base
COMPARISONS = (
    (OURS, "random subspace K=32"),
    (OURS, "LoRA, equal parameters to K=32"),
    (OURS, FULL),
    ("EigenLoRA K=8", "random subspace K=8"),
    ("EigenLoRA K=8", "LoRA, equal parameters to K=8"),
    ("EigenLoRA K=8", FULL),
    ("EigenLoRA K=8", OURS),
    ("mean-only subspace", OURS),
    ("mean-only subspace", "random subspace K=32"),
)


def tested(rows: list[dict]) -> Cells:
    """Method to the rows of its (target, seed) pairs, at its chosen rate; "METHOD at RATE" where it was another."""
    chosen, other = defaultdict(dict), defaultdict(dict)
    for row in rows:
        if row["stage"] == "test" and row["method"] in METHODS:
            name, pair = row["method"], (row["target"], row["seed"])
            if row["rate"] == best_rate(rows, name):
                chosen[name][pair] = row
            else:
                other[f"{name} at {row['rate']:g}"][pair] = row
    return {name: chosen[name] for name in METHODS if name in chosen} | other


def tuning_table(rows: list[dict]) -> str:
    lines = ["| method | loss at each rate (mean of two tuning tasks) | chosen |\n|---|---|---|"]
    for name, method in METHODS.items():
        losses = defaultdict(list)
        for row in rows:
            if row["stage"] == "tune" and row["method"] == name:
                losses[row["rate"]].append(row["loss"])
        if method.tuned_as is None and losses:
            tried = ", ".join(f"{rate:g}: {fmean(values):.3f}" for rate, values in sorted(losses.items()))
            lines.append(f"| {name} | {tried} | {best_rate(rows, name):g} |")
    return "\n".join(lines)


def method_table(cells: Cells, base: dict[str, dict]) -> str:
    targets = [target for target in TARGETS if target in base]
    losses = " | ".join(f"{base[target]['loss']:.3f}" for target in targets)
    lines = [
        f"| method | parameters | rate | {' | '.join(targets)} | share of LoRA r8's gain | right answers |",
        "|" + "---|" * (len(targets) + 5),
        f"| base, untrained | 0 | | {losses} | 0 | {fmean(base[target]['exact'] for target in targets):.3f} |",
    ]
    for method, found in cells.items():
        means = []
        for name in targets:
            values = [row["loss"] for (target, _), row in found.items() if target == name]
            means.append(f"{fmean(values):.3f}" if values else "")
        pairs = sorted(set(found) & set(cells.get(FULL, {})))
        shares = [
            (base[pair[0]]["loss"] - found[pair]["loss"]) / (base[pair[0]]["loss"] - cells[FULL][pair]["loss"])
            for pair in pairs
        ]
        row = next(iter(found.values()))
        share = f"{fmean(shares):.2f} ({len(pairs)})" if pairs else ""
        right = fmean(row["exact"] for row in found.values())
        lines.append(
            f"| {method} | {row['parameters']:,} | {row['rate']:g} | {' | '.join(means)} | {share} | {right:.3f} |"
        )
    return "\n".join(lines)


def comparison_table(cells: Cells) -> str:
    lines = ["| comparison of held-out losses | over targets and seeds | over targets |\n|---|---|---|"]
    for one, other in comparisons(cells):
        found = difference(cells, one, other, measure="loss")
        if found is not None:
            by_target = shown(difference_by_target(cells, one, other, measure="loss"))
            lines.append(f"| {one} minus {other} | {shown(found)} | {by_target} |")
    return "\n".join(lines)


def comparisons(cells: Cells) -> list[tuple[str, str]]:
    """Those of the chosen rates, then the other rates that were run beside the same controls of equal size."""
    elsewhere = [(name, one, other) for name in cells for one, other in COMPARISONS if name.startswith(f"{one} at ")]
    return [*COMPARISONS, *((name, other) for name, one, other in elsewhere if other not in (FULL, OURS))]


def first_step(curve: list[list[float]], loss: float) -> int | None:
    """The first judged step at which the held-out loss is no higher; None if there is none."""
    return next((step for step, found, *_ in curve if found <= loss), None)


def steps_table(cells: Cells, base: dict[str, dict]) -> str:
    """When each method reaches what LoRA r 8 reached at the end, on the same target and seed."""
    lines = [f"| method | reaches LoRA r8's final loss | reaches {NEARLY:.0%} of its gain |\n|---|---|---|"]
    for method in [name for name in cells if name in METHODS]:
        found, columns = cells[method], []
        for share in (1.0, NEARLY):
            steps = []
            for pair in sorted(set(found) & set(cells.get(FULL, {}))):
                start, end = base[pair[0]]["loss"], cells[FULL][pair]["loss"]
                steps.append(first_step(found[pair]["curve"], (1 - share) * start + share * end))
            reached = [step for step in steps if step is not None]
            when = f", median step {median(reached):g}" if reached else ": never"
            columns.append(f"{len(reached)} of {len(steps)}{when}")
        lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(cells: Cells, base: dict[str, dict]) -> None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, gaps = figure.subplots(1, 2, width_ratios=[1.2, 1])
    most = max(len(found) for found in cells.values())
    complete = {method: found for method, found in cells.items() if len(found) == most and method in METHODS}
    colors = dict(zip(METHODS, ("C0", "C0", "C0", "C1", "C1", "C1", "black", "C2"), strict=True))
    for method, found in complete.items():
        steps = [0, *(step for step, *_ in next(iter(found.values()))["curve"])]
        start = fmean(base[target]["loss"] for target, _ in found)
        means = [
            fmean(losses) for losses in zip(*([p[1] for p in row["curve"]] for row in found.values()), strict=True)
        ]
        style = "-" if method.startswith("EigenLoRA") or method == FULL else ":" if "random" in method else "--"
        curves.plot(steps, [start, *means], style, color=colors[method], label=method, marker=".")
    n_targets = len({target for found in complete.values() for target, _ in found})
    curves.set(
        xlabel="step", ylabel="held-out loss", title=f"Mean of {n_targets} left-out targets, {most} runs a method"
    )
    curves.legend(fontsize=8)
    curves.grid(alpha=0.3)
    shown_gaps = [(pair, found) for pair in COMPARISONS if (found := difference(cells, *pair, measure="loss"))]
    for place, (_, (mean, error, _)) in enumerate(shown_gaps):
        gaps.errorbar(mean, -place, xerr=error, fmt="o", color="C0", markersize=4, capsize=2)
    labels = [f"{one}\nminus {other}" for (one, other), _ in shown_gaps]
    gaps.set_yticks(range(0, -len(shown_gaps), -1), labels, fontsize=8)
    gaps.axvline(0, color="black", linewidth=0.8)
    gaps.set(xlabel="difference of held-out loss, 95 % interval", title="Below zero: the first is better")
    gaps.grid(axis="x", alpha=0.3)
    figure.savefig(FIGURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="page to fill in, instead of printing")
    arguments = parser.parse_args()
    rows = read(arguments.results)
    cells = tested(rows)
    base = {row["target"]: row for row in rows if row["stage"] == "test" and row["method"] == "base"}
    found = {
        "causal-rates": tuning_table(rows),
        "causal-methods": method_table(cells, base),
        "causal-comparisons": comparison_table(cells),
        "causal-steps": steps_table(cells, base),
    }
    if arguments.docs:
        arguments.docs.write_text(filled(arguments.docs.read_text(), found))
    else:
        for name, table in found.items():
            print(f"\n<!-- {name} -->\n{table}")
    draw(cells, base)


if __name__ == "__main__":
    main()
