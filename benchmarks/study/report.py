"""The study's table: accuracy of every method on every target, and its gap to EigenLoRA, paired by target and seed.

Command:  python benchmarks/study/report.py [--results FILE]
Writes:   a markdown table on stdout, from the cells that every method has finished.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from encoder import RESULTS, best_rate

OURS = "EigenLoRA balanced, low_rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--n-train", type=int, default=256)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    cells = defaultdict(dict)
    details = {}
    tested = [row for row in rows if row["stage"] == "test" and row["n_train"] == arguments.n_train]
    rates = {method: best_rate(rows, method, arguments.n_train) for method in {row["method"] for row in tested}}
    for row in tested:
        if row["rate"] == rates[row["method"]]:  # widening a grid can change the choice
            cells[row["target"], row["seed"]][row["method"]] = row["accuracy"]
            details[row["method"]] = row["parameters"], row["rate"]
    complete = {cell: found for cell, found in cells.items() if len(found) == len(details)}
    targets = sorted({target for target, _ in complete})
    print(f"{len(complete)} of {len(cells)} (target, seed) pairs are complete, {arguments.n_train} training rows.\n")
    print("| method | parameters | learning rate | " + " | ".join(targets) + " | mean | EigenLoRA minus it |")
    print("|" + "---|" * (len(targets) + 5))
    for method, (parameters, rate) in details.items():
        means = [fmean(found[method] for (target, _), found in complete.items() if target == name) for name in targets]
        gaps = [found[OURS] - found[method] for found in complete.values()]
        error = 2 * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        gap = "" if method == OURS else f"{fmean(gaps):+.3f} ± {error:.3f}"
        shown = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {method} | {parameters:,} | {rate:g} | {shown} | {fmean(means):.3f} | {gap} |")


if __name__ == "__main__":
    main()
