"""Which learning rate suits each method of the demo? As many for each, judged on rows that the demo trains on.

Command:  python benchmarks/learning_rates.py [--methods "head only" EigenLoRA] [--threads 2]
Hardware: 2 CPU cores; about half an hour. Started again, it goes on where it stopped.
Writes:   benchmarks/results/learning_rates.json and a line a training on stdout.

Neither the demo's test rows nor its seeds are used: of the shipped training rows of each intent, five are held out to judge by
and the others are trained on, with seed 100. `eigenpeft.demo.methods` has the winners.
"""

import argparse
import json
import platform
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars

import eigenpeft
from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import shipped_adapters
from eigenpeft.demo.methods import BATCH_SIZE, HEAD_LEARNING_RATE, N_COMPONENTS, STEPS, methods
from eigenpeft.demo.training import Task, load_task, train

RESULTS = Path(__file__).parent / "results" / "learning_rates.json"
# The head first: its best rate is HEAD_LEARNING_RATE of all methods. Widened until the best is no end of the grid.
LEARNING_RATES = {
    "head only": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "random subspace": (1e-3, 3e-3, 1e-2, 3e-2),
    "EigenLoRA": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA, equal parameters": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA, equal rank": (3e-4, 1e-3, 3e-3, 1e-2),
}
SEED = 100
N_HELD_OUT = 5


def tuning_task() -> Task:
    """The demo's training rows, split anew; its test rows are dropped."""
    task = load_task()
    rows_of = defaultdict(list)
    for row, label in enumerate(task.train["labels"]):
        rows_of[label].append(row)
    return Task(
        train=task.train.select([row for rows in rows_of.values() for row in rows[N_HELD_OUT:]]),
        test=task.train.select([row for rows in rows_of.values() for row in rows[:N_HELD_OUT]]),
        collator=task.collator,
        n_labels=task.n_labels,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=None, help="instead of the grids")
    parser.add_argument("--adapters", type=Path, default=shipped_adapters())
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with AdapterCollection.from_pretrained(arguments.adapters) as collection:
        subspace = SubspaceBuilder(n_components=N_COMPONENTS).fit(collection).subspace_
    task = tuning_task()
    record = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"rows": []}
    for method in methods(subspace):
        for learning_rate in arguments.learning_rates or LEARNING_RATES[method.name]:
            row = {"method": method.name, "learning_rate": learning_rate, "steps": arguments.steps, "seed": SEED}
            done = any(row.items() <= other.items() for other in record["rows"])
            if done or (arguments.methods and method.name not in arguments.methods):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                trained = train(
                    task,
                    lambda base, method=method: method.adapt(base, SEED),
                    seed=SEED,
                    steps=arguments.steps,
                    batch_size=BATCH_SIZE,
                    learning_rate=learning_rate,
                    head_learning_rate=learning_rate if method.name == "head only" else HEAD_LEARNING_RATE,
                    scratch=scratch,
                )
            row |= {"accuracy": round(trained.accuracy, 4), "seconds": round(trained.seconds, 1)}
            print(f"{method.name:22} {learning_rate:g}: {row['accuracy']:.3f} in {row['seconds']:.0f} s", flush=True)
            record["rows"].append(row)
            record |= {
                "n_train": len(task.train),
                "n_held_out": len(task.test),
                "environment": {
                    "eigenpeft": eigenpeft.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                    "threads": arguments.threads,
                },
            }
            arguments.results.parent.mkdir(exist_ok=True)
            arguments.results.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
