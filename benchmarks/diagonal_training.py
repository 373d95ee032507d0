"""Does a diagonal core train better on paired directions than on balanced bases or random ones? Left-out tasks of all-MiniLM-L6-v2.

Command:   python benchmarks/diagonal_training.py --data DIR
Hardware:  CPU, one thread; about forty seconds of CPU time per task and seed.
Writes:    benchmarks/results/diagonal_training.json (after each task; started again, it goes on) and lines on stdout.

Per target the subspace (K 16) is of the nine other shipped adapters, on query and value of the last two layers; the head is trained
first, alone and to the end, and frozen, so that what is measured is what 64 numbers add to it. 100 steps of 8 rows with Adam, the
same rows and batches for all; the rate of each basis is chosen on 100 rows that are neither trained on nor tested on. Controls: the
head alone, and random orthonormal bases of the same sizes, whose pairs are random too.
How it is run: zeroth_order.py. Standard errors are over targets, each the mean of its seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import torch
import zeroth_order
from huggingface_hub.utils import disable_progress_bars
from timing import environment
from transformers import AutoModelForSequenceClassification

from eigenpeft import SubspaceBuilder
from eigenpeft.demo.assets import base_model
from eigenpeft.subspace import random_subspace

RESULTS = Path(__file__).parent / "results" / "diagonal_training.json"
TARGETS = ("trec6", "cr", "tweet_irony", "mpqa", "subj", "tweet_emotion", "mr", "sst2", "mrpc", "sick_entail")
STEPS, RATES = 100, (3e-1, 1.0)


def bases(task, seed):
    """Three subspaces of the same sizes."""
    with zeroth_order.others(task) as collection:
        built = {
            method: zeroth_order.renamed(SubspaceBuilder(zeroth_order.K, method=method).fit(collection).subspace_)
            for method in ("paired", "balanced")
        }
    return {**built, "random": random_subspace(like=built["balanced"], seed=seed)}


def judge(data, task, seed):
    parts, n_labels = zeroth_order.prepared(
        data, task, AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
    )
    head, found = zeroth_order.head_of(parts, n_labels)
    row = {"task": task, "seed": seed, "head": found["test"]}
    for name, subspace in bases(task, seed).items():
        tried = [
            zeroth_order.run("adam", head, subspace, parts, n_labels, rate=rate, steps=STEPS, seed=seed)
            for rate in RATES
        ]
        best = max(tried, key=lambda each: each["choice"])
        row[name] = best["test"]
        row[f"{name} tried"] = tried
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="goes on from the rows that it holds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    for seed in given.seeds:
        for task in given.targets:
            if any((row["task"], row["seed"]) == (task, seed) for row in rows):
                continue
            rows.append(judge(given.data, task, seed))
            shown = {key: value for key, value in rows[-1].items() if not key.endswith("tried")}
            print(shown, flush=True)
            found = {"environment": environment(), "summary": summary(rows), "rows": rows}
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))


def summary(rows):
    """Differences of accuracy; observations are targets, each the mean of its seeds, with the standard error over them."""
    found = {}
    for other in ("balanced", "random", "head"):
        gains = {}
        for row in rows:
            gains.setdefault(row["task"], []).append(row["paired"] - row[other])
        means = [fmean(each) for each in gains.values()]
        found[f"paired minus {other}"] = {
            "mean": fmean(means),
            "standard error": stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
            "ahead": sum(mean > 0 for mean in means),
            "of": len(means),
        }
    return found


if __name__ == "__main__":
    main()
