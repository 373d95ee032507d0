"""The study's tables and picture: every method beside its controls, and what the gradient share predicts.

Command:  python benchmarks/study/report.py [--docs docs/study.md]
Writes:   the tables as markdown, to stdout or between the marks `<!-- NAME -->` and `<!-- end -->` of a page, and
          benchmarks/results/study/study.png, from the cells that are there. Differences are paired by target and seed; intervals
          are 95 % (Student's t over the pairs; for rank correlations, a bootstrap over targets and seeds).
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from compare import (
    HEAD,
    Cells,
    accuracies,
    controls_of,
    correlations,
    difference,
    difference_by_target,
    rank_correlation,
    shown,
)
from encoder import FRESH_TARGETS, RESULTS, TARGETS, read
from figure import draw
from gradient import GRADIENT_RESULTS
from methods import FEW, OURS, RANDOM
from plan import ALL_ROWS, ALL_ROWS_STEPS, CONTENDERS, K8, MAIN

FIGURE = RESULTS.with_name("study.png")
_MARK = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def on(cells: Cells, *, targets: Iterable[str], seeds: Iterable[int] | None = None) -> Cells:
    """The cells of some targets and seeds; methods without any are left out."""
    kept = {
        method: {
            (target, seed): row
            for (target, seed), row in found.items()
            if target in targets and (seeds is None or seed in seeds)
        }
        for method, found in cells.items()
    }
    return {method: found for method, found in kept.items() if found}


def only(cells: Cells, methods: Iterable[str]) -> Cells:
    return {method: cells[method] for method in methods if method in cells}


def method_table(cells: Cells) -> str:
    targets = sorted({target for method in cells.values() for target, _ in method})
    lines = [
        "| method | parameters | rate | " + " | ".join(targets) + " | minus head | minus random | minus small LoRA |",
        "|" + "---|" * (len(targets) + 6),
    ]
    for method, found in cells.items():
        means = []
        for name in targets:
            values = [row["accuracy"] for (target, _), row in found.items() if target == name]
            means.append(f"{fmean(values):.3f}" if values else "")
        row = next(iter(found.values()))
        random, small = controls_of(method)
        gaps = [shown(difference(cells, method, other)) for other in (HEAD, random, small)]
        lines.append(
            f"| {method} | {row['parameters']:,} | {row['rate']:g} | {' | '.join(means)} | {' | '.join(gaps)} |"
        )
    return "\n".join(lines)


def comparison_table(cells: Cells, methods: Iterable[str] | None = None) -> str:
    """Every method, or some of them, beside its controls and, of those that do best for their size, beside larger ones."""
    lines = ["| comparison | over targets and seeds | over targets |", "|---|---|---|"]
    for method in cells if methods is None else methods:
        larger = [OURS, FEW, "LoRA r8"] if method == K8 else [OURS, "LoRA r8"] if method in CONTENDERS else []
        others = [*controls_of(method), *(larger if method.startswith("EigenLoRA") else [])]
        for other in dict.fromkeys(others):
            found = difference(cells, method, other)
            if other is not None and found is not None:
                by_target = shown(difference_by_target(cells, method, other))
                lines.append(f"| {method} minus {other} | {shown(found)} | {by_target} |")
    return "\n".join(lines)


def common(cells: Cells) -> Cells:
    """The cells of those (target, seed) pairs that nearly all methods have, and the methods that have them all."""
    reach = Counter(pair for found in cells.values() for pair in found)
    pairs = sorted(pair for pair, count in reach.items() if count >= 0.9 * max(reach.values()))
    return {
        method: {pair: found[pair] for pair in pairs} for method, found in cells.items() if found.keys() >= set(pairs)
    }


def sweep_table(cells: Cells) -> str:
    """Every method by its mean over the pairs."""
    lines = ["| method | parameters | rate | mean | minus EigenLoRA, K = 32 | minus random | minus small LoRA |"]
    lines.append("|" + "---|" * 7)
    for method, found in cells.items():
        if method == HEAD:
            continue
        row = next(iter(found.values()))
        others = (None if method == OURS else OURS, *controls_of(method))
        gaps = [shown(difference(cells, method, other)) for other in others]
        mean = fmean(cell["accuracy"] for cell in found.values())
        lines.append(f"| {method} | {row['parameters']:,} | {row['rate']:g} | {mean:.3f} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def gradient_table(records: list[dict]) -> str:
    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record)
    lines = ["| subspace | components in all | gradient share | gain over the head | pairs |", "|---|---|---|---|---|"]
    for method, found in by_method.items():
        share, gain = fmean(r["share"] for r in found), fmean(r["gain"] for r in found)
        lines.append(f"| {method} | {found[0]['components']} | {share:.4f} | {gain:+.3f} | {len(found)} |")
    lines += ["", "| rank correlation of share and gain | 95 % interval | cells |", "|---|---|---|"]
    for title, within in (
        ("over all cells", None),
        ("inside each target and seed", lambda record: record["pair"]),
        ("inside each target, seed and size", lambda record: (record["pair"], record["components"])),
    ):
        value, low, high = rank_correlation(records, within=within)
        lines.append(f"| {title}: {value:+.2f} | {low:+.2f} to {high:+.2f} | {len(records)} |")
    return "\n".join(lines)


def tables(rows: list[dict], shares: list[dict]) -> dict[str, str]:
    """Name of a mark to its table."""
    everywhere = (*TARGETS, *FRESH_TARGETS)
    found = {}
    for n_train in (256, 64):
        cells = accuracies(rows, n_train)
        if not cells:
            continue
        main = on(cells, targets=TARGETS)
        if n_train == 256:  # the others are in the sweep's table
            main = only(main, MAIN)
        few = {method: found for method, found in cells.items() if method == HEAD or "K=8" in method}
        fresh = on(few, targets=FRESH_TARGETS)
        found[f"methods-{n_train}"] = method_table(main)
        found[f"comparisons-{n_train}"] = comparison_table(main)
        if fresh:
            found[f"fresh-{n_train}"] = method_table(fresh)
            found[f"fresh-comparisons-{n_train}"] = comparison_table(fresh)
            found[f"all-targets-{n_train}"] = comparison_table(on(few, targets=everywhere))
    whole = accuracies(rows, ALL_ROWS, steps=ALL_ROWS_STEPS)
    if whole:
        found["methods-all"] = method_table(common(whole))
        found["comparisons-all"] = comparison_table(common(whole))
    kinds = {method: found for method, found in accuracies(rows, 256).items() if " r=" not in method}
    found["sweep"] = sweep_table(common(on(kinds, targets=TARGETS, seeds=[0])))
    found["contenders"] = sweep_table(common(on(only(accuracies(rows, 256), (*MAIN, *CONTENDERS)), targets=TARGETS)))
    found["contender-comparisons"] = comparison_table(accuracies(rows, 256), CONTENDERS)
    beside = (OURS, RANDOM, FEW, f"{FEW} to K=8")
    ranks = {method: cells for method, cells in accuracies(rows, 256).items() if " r=" in method or method in beside}
    found["rank"] = sweep_table(common(on(ranks, targets=TARGETS, seeds=[0])))
    records = correlations(accuracies(rows, 256), [row for row in shares if row["n_train"] == 256])
    if records:
        found["gradient"] = gradient_table(records)
    return found


def filled(page: str, found: dict[str, str]) -> str:
    """The page with every marked table replaced; marks without a table stay."""
    return _MARK.sub(lambda mark: f"{mark[1]}{found[mark[2]]}\n{mark[3]}" if mark[2] in found else mark[0], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="page to fill in, instead of printing")
    arguments = parser.parse_args()
    rows, shares = read(arguments.results), read(GRADIENT_RESULTS)
    found = tables(rows, shares)
    if arguments.docs:
        arguments.docs.write_text(filled(arguments.docs.read_text(), found))
    else:
        for name, table in found.items():
            print(f"\n<!-- {name} -->\n{table}")
    by_size = {n_train: only(accuracies(rows, n_train), MAIN) for n_train in (256, 64)}
    records = correlations(accuracies(rows, 256), [row for row in shares if row["n_train"] == 256])
    draw(by_size, records, FIGURE)


if __name__ == "__main__":
    main()
