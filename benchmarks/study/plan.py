"""All cells of the encoder's study that docs/study.md shows, in one command.

Command:   python benchmarks/study/plan.py --data DIR [--missing] [--shard 0/2]
Hardware:  CPU, one thread; 10 to 25 s per cell: some five hours from nothing, seconds where all cells are there.
Writes:    as encoder.py. Started again, it goes on where it stopped; --missing only counts.
"""

import argparse
from pathlib import Path

from compare import HEAD
from encoder import FRESH_TARGETS, RESULTS, Slice, quiet, run_slice
from methods import FEW, OURS, RANDOM

K8 = "EigenLoRA K=8"
CONTROLS_OF_K8 = ("random subspace K=8", f"{FEW} to K=8")
# Tuned by themselves and run with three seeds.
MAIN = (HEAD, RANDOM, OURS, FEW, "LoRA r8", K8, *CONTROLS_OF_K8, f"{FEW} to K=8, spread")
# Of the sweep, what did best for its number of parameters, each with its controls: three seeds as well.
CONTENDERS = (
    *("EigenLoRA mixer", "random subspace mixer", f"{FEW} to K=64"),
    *("EigenLoRA diagonal", "random subspace diagonal", "LoRA, rank 1 on one module"),
    *("EigenLoRA r=2", "random subspace r=2"),
)
ALL_ROWS, ALL_ROWS_STEPS = 6000, 400
_K8 = (HEAD, K8, *CONTROLS_OF_K8)

PLAN = (
    Slice("tune"),
    Slice("test", MAIN),
    Slice("test", _K8, FRESH_TARGETS),
    Slice("test", seeds=(0,)),
    Slice("test", CONTENDERS),
    Slice("test", _K8, n_train=64),
    Slice("test", (RANDOM, OURS, FEW), seeds=(0,), n_train=64),
    Slice(
        "test",
        (*_K8, OURS, "LoRA r8"),
        ("subj", "trec6", "sst2"),
        seeds=(0,),
        n_train=ALL_ROWS,
        steps=ALL_ROWS_STEPS,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--missing", action="store_true", help="count the cells that are missing, and stop")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    quiet()
    for part in PLAN:
        if given.missing:
            print(
                f"{len(part.missing(given.results)):4} missing of {part.stage}: {len(part.methods)} methods, "
                f"{len(part.targets)} targets, seeds {part.seeds}, {part.n_train} rows, {part.steps} steps"
            )
        else:
            run_slice(part, data=given.data, shard=given.shard, results=given.results)


if __name__ == "__main__":
    main()
