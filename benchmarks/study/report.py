"""The study's tables and figure: every method beside its controls, and what the gradient share predicts.

Command:  python benchmarks/study/report.py [--results FOLDER]
Writes:   markdown tables on stdout and benchmarks/results/study/study.png, from the cells that are there. Differences are
          paired by target and seed; intervals are 95 % (Student's t over the pairs; for rank correlations, a bootstrap over
          targets and seeds).
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from encoder import RESULTS, best_rate, read
from gradient import GRADIENT_RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import FEW, METHODS, OURS, RANDOM
from scipy import stats

HEAD = "head only"
FIGURE = RESULTS.with_name("study.png")


def accuracies(rows: list[dict], n_train: int) -> dict[str, dict[tuple[str, int], dict]]:
    """Method to the rows of its (target, seed) pairs, at its chosen rate."""
    found = defaultdict(dict)
    tested = [row for row in rows if row["stage"] == "test" and row["n_train"] == n_train and row["method"] in METHODS]
    rates = {method: best_rate(rows, method) for method in {row["method"] for row in tested}}
    for row in tested:
        if row["rate"] == rates[row["method"]]:  # widening a grid can change the choice
            found[row["method"]][row["target"], row["seed"]] = row
    return {name: found[name] for name in METHODS if name in found}


def controls_of(method: str) -> tuple[str | None, str | None]:
    """The random subspace and the LoRA that a method is held against."""
    if method == OURS:
        return RANDOM, FEW
    if method.startswith("EigenLoRA ") or method in ("mean-only subspace", "shuffled subspace"):
        kind = method.removeprefix("EigenLoRA ").split(", ")[0]
        twin, small = f"random subspace {kind}", f"{FEW} to {kind}"
        same_size = twin not in METHODS or kind.startswith("alpha")
        return (twin if twin in METHODS else RANDOM), (small if small in METHODS else FEW if same_size else None)
    return None, None


def difference(cells: dict, one: str, other: str | None) -> tuple[float, float, int] | None:
    """Mean paired difference, half its 95 % interval, pairs; None below three pairs."""
    if other is None or one not in cells or other not in cells:
        return None
    pairs = sorted(set(cells[one]) & set(cells[other]))
    gaps = [cells[one][pair]["accuracy"] - cells[other][pair]["accuracy"] for pair in pairs]
    if len(gaps) < 3:
        return None
    error = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), error, len(gaps)


def difference_by_target(cells: dict, one: str, other: str) -> tuple[float, float, int] | None:
    """As `difference`, with the mean over seeds of every target as one observation: what holds for another target."""
    by_target = defaultdict(list)
    for pair in set(cells[one]) & set(cells[other]):
        by_target[pair[0]].append(cells[one][pair]["accuracy"] - cells[other][pair]["accuracy"])
    gaps = [fmean(values) for values in by_target.values()]
    if len(gaps) < 3:
        return None
    error = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), error, len(gaps)


def shown(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return ""
    mean, error, n = found
    text = f"{mean:+.3f} ± {error:.3f} ({n})"
    return f"**{text}**" if abs(mean) > error else text


def method_table(cells: dict) -> None:
    targets = sorted({target for method in cells.values() for target, _ in method})
    print("| method | parameters | rate | " + " | ".join(targets) + " | minus head | minus random | minus small LoRA |")
    print("|" + "---|" * (len(targets) + 6))
    for method, found in cells.items():
        means = []
        for name in targets:
            values = [row["accuracy"] for (target, _), row in found.items() if target == name]
            means.append(f"{fmean(values):.3f}" if values else "")
        row = next(iter(found.values()))
        random, small = controls_of(method)
        gaps = [shown(difference(cells, method, other)) for other in (HEAD, random, small)]
        print(f"| {method} | {row['parameters']:,} | {row['rate']:g} | {' | '.join(means)} | {' | '.join(gaps)} |")


def comparison_table(cells: dict) -> None:
    print("\n| comparison | over targets and seeds | over targets |\n|---|---|---|")
    for method in cells:
        others = [*controls_of(method), *([OURS, FEW, "LoRA r8"] if method == "EigenLoRA K=8" else [])]
        for other in dict.fromkeys(others):
            found = difference(cells, method, other)
            if other is not None and found is not None:
                print(
                    f"| {method} minus {other} | {shown(found)} | {shown(difference_by_target(cells, method, other))} |"
                )


def correlations(cells: dict, shares: list[dict]) -> list[dict]:
    """One record a (subspace, target, seed) that was both measured and trained in."""
    found = []
    for row in shares:
        pair = (row["target"], row["seed"])
        if pair in cells.get(row["method"], {}) and pair in cells[HEAD]:
            gain = cells[row["method"]][pair]["accuracy"] - cells[HEAD][pair]["accuracy"]
            found.append({**row, "gain": gain, "accuracy": cells[row["method"]][pair]["accuracy"], "pair": pair})
    return found


def rank_correlation(records: list[dict], *, within: Callable | None, draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's correlation of share and gain with a 95 % interval; `within`: of ranks inside each value of that key."""

    def value(chosen: list[dict]) -> float:
        by_pair = defaultdict(list)
        for i, record in enumerate(chosen):
            by_pair[(record.get("draw"), within(record)) if within else None].append(i)
        x, y = np.zeros(len(chosen)), np.zeros(len(chosen))
        for places in by_pair.values():
            for values, key in ((x, "share"), (y, "gain")):
                ranks = stats.rankdata([chosen[i][key] for i in places])
                values[places] = ranks - ranks.mean()
        return float((x @ y) / np.sqrt((x @ x) * (y @ y)))

    pairs = sorted({record["pair"] for record in records})
    generator = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        drawn = generator.integers(len(pairs), size=len(pairs))
        chosen = [{**r, "draw": i} for i, p in enumerate(drawn) for r in records if r["pair"] == pairs[p]]
        values.append(value(chosen))
    low, high = np.quantile(values, [0.025, 0.975])
    return value(records), float(low), float(high)


def gradient_table(records: list[dict]) -> None:
    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record)
    print("| subspace | components in all | gradient share | gain over the head | pairs |\n|---|---|---|---|---|")
    for method, found in by_method.items():
        share, gain = fmean(r["share"] for r in found), fmean(r["gain"] for r in found)
        print(f"| {method} | {found[0]['components']} | {share:.4f} | {gain:+.3f} | {len(found)} |")
    print("\n| rank correlation of share and gain | 95 % interval | cells |\n|---|---|---|")
    for title, within in (
        ("over all cells", None),
        ("inside each target and seed", lambda record: record["pair"]),
        ("inside each target, seed and size", lambda record: (record["pair"], record["components"])),
    ):
        value, low, high = rank_correlation(records, within=within)
        print(f"| {title}: {value:+.2f} | {low:+.2f} to {high:+.2f} | {len(records)} |")


def draw(tables: dict[int, dict], records: list[dict]) -> None:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    gaps, scatter = figure.subplots(1, 2, width_ratios=[1.5, 1])
    labels, place = [], 0
    for n_train, cells in tables.items():
        for method in cells:
            random, small = controls_of(method)
            bars = [
                (difference(cells, method, other), colour)
                for other, colour in ((random, "tab:blue"), (small, "tab:orange"))
            ]
            if not any(found for found, _ in bars):
                continue
            for (found, colour), shift in zip(bars, (0.15, -0.15), strict=True):
                if found:
                    gaps.errorbar(
                        found[0], place + shift, xerr=found[1], fmt="o", color=colour, markersize=4, capsize=2
                    )
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
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = read(arguments.results)
    tables = {}
    for n_train in sorted({row["n_train"] for row in rows if row["stage"] == "test"}, reverse=True):
        tables[n_train] = accuracies(rows, n_train)
        print(f"\n## {n_train} training rows\n")
        method_table(tables[n_train])
        comparison_table(tables[n_train])
    records = [
        record
        for n_train, cells in tables.items()
        for record in correlations(cells, [row for row in read(GRADIENT_RESULTS) if row["n_train"] == n_train])
    ]
    if records:
        print("\n## The gradient's share\n")
        gradient_table(records)
    draw(tables, records)


if __name__ == "__main__":
    main()
