"""Does the share of a new task's gradient inside a subspace, before any training, predict what training reaches there?

Command:   python benchmarks/study/gradient.py --data DIR   (after benchmarks/study/encoder.py)
Hardware:  CPU, one thread; about half a minute a (target, seed) pair.
Writes:    benchmarks/results/study/gradient.jsonl: for every target, seed and subspace of the study the share of the gradient
           on 64 training rows, behind a head trained alone. Started again, it goes on where it stopped.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from encoder import RESULTS, TARGETS, append, best_rate, environment, nearest_source, quiet, read, train
from methods import METHODS, OURS, RANDOM, Situation
from tasks import load_task

from eigenpeft.audit import gradient_share
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import shipped_adapters

GRADIENT_RESULTS = RESULTS.with_name("gradient.jsonl")
N_ROWS, BATCH_SIZE = 64, 16


# Methods whose only difference is the subspace: rank, core, alpha and start are the default ones.
MEASURED = (
    *(OURS, RANDOM, "EigenLoRA K=8", "random subspace K=8", "EigenLoRA K=16", "random subspace K=16"),
    *("EigenLoRA eigenlorax", "EigenLoRA hooi", "mean-only subspace", "shuffled subspace"),
)
MEASURED_SEEDS = (0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n-train", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(MEASURED_SEEDS))
    arguments = parser.parse_args()
    quiet()
    zoo = AdapterCollection.from_pretrained(shipped_adapters())
    rows = read(RESULTS)
    rate = best_rate(rows, "head only")
    for seed in arguments.seeds:
        for target in TARGETS:
            cell = {"target": target, "seed": seed, "n_train": arguments.n_train}
            done = [row["method"] for row in read(GRADIENT_RESULTS) if cell.items() <= row.items()]
            missing = [name for name in arguments.methods if name not in done]
            if not missing:
                continue
            task = load_task(target, n_train=arguments.n_train, seed=seed, data=arguments.data)
            sources = zoo.without(target) if target in zoo else zoo
            nearest = partial(nearest_source, task, target=target, seed=seed, sources=sources, results=RESULTS)
            situation = Situation(sources, seed, nearest)
            with tempfile.TemporaryDirectory() as scratch:
                head = METHODS["head only"]
                model, _, _ = train(task, head, rate=rate, head_rate=rate, situation=situation, scratch=scratch)
            starts = range(0, N_ROWS, BATCH_SIZE)
            batches = [task.collator([task.train[i] for i in range(start, start + BATCH_SIZE)]) for start in starts]
            for name in missing:
                subspace = METHODS[name].subspace(situation)
                found = gradient_share(model, batches=batches, subspace=subspace, seeds=())
                append(
                    GRADIENT_RESULTS,
                    {
                        **cell,
                        "method": name,
                        "share": found.share,
                        "optimum": found.optimum,
                        "components": sum(bases.n_components for bases in subspace.values()),
                        "environment": environment(),
                    },
                )
                print(f"{target:14} {seed} {name:32} {found.share:.4f} of {found.optimum:.4f}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
