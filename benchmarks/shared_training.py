"""Training with what layers share, at equal numbers: shared banks, mixtures of shards, a common A, beside LoRA and PEFT's own.

Papers:    MoS, arXiv 2410.00938; ASLoRA, arXiv 2412.10135; EigenLoRAx, arXiv 2502.04700; LoRA, arXiv 2106.09685;
           VB-LoRA, arXiv 2405.15179; Uni-LoRA, arXiv 2506.00799; TinyLoRA, arXiv 2602.04118.
Command:   python benchmarks/shared_training.py --data DIR --work DIR   (DIR of data holds banking77/, JSONL)
           python benchmarks/shared_training.py --report [--work DIR]
Hardware:  CPU, one thread; 4 to 8 s of CPU time a cell.
Writes:    WORK/shared_training.jsonl, a line per cell; started again, it goes on where it stopped. --report prints the tables and
           copies the cells to benchmarks/results/shared_training.jsonl.

The zoo: the sixteen related adapters that eigenpeft ships (customers of a bank; 8 of 38 intents of banking77 each). The targets:
six new customers with 6 intents each, no two with a common one and none that an adapter has seen, 32 rows, 30 steps. Every method
trains 9,216 numbers beside the head (VB-LoRA 9,248), as many as LoRA of rank 2 on query and value of the last three layers, which
are what all of them adapt and share. Rates are chosen for each method, of two, on one customer whose intents are in no target
(they are among the zoo's). Same rows, steps, batches and head for all methods of a (target, seed); benchmarks/regimes/training.py
trains them.
"""

import argparse
import random
import sys
import time
from functools import lru_cache
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "regimes"))

import customers  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from compare import gaps, interval, shown  # noqa: E402
from methods import HEAD_RATE_BESIDE_ADAPTER, head_only  # noqa: E402
from peft import LoraConfig, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, get_peft_model  # noqa: E402
from run import append, environment, quiet, read  # noqa: E402

from eigenpeft import AdapterCollection, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder  # noqa: E402
from eigenpeft.demo import related_adapters  # noqa: E402
from eigenpeft.subspace import random_subspace  # noqa: E402
from eigenpeft.tuners import ShardLoraConfig  # noqa: E402

RESULTS = HERE / "results" / "shared_training.jsonl"
LAYERS = (3, 4, 5)
MODULES = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in LAYERS for name in ("query", "value")]
N_TARGETS, N_INTENTS, N_ROWS, STEPS, SEEDS, TUNING_SEED = 6, 6, 32, 30, (0, 1, 2), 100
COEFFICIENT_RATES, LORA_RATES = (1e-2, 3e-2), (3e-3, 1e-2)


def kind(module):
    """ "query" or "value" of the adapted layers; or of the others, whose banks nothing uses."""
    return module.rpartition(".")[2] + ("" if module in MODULES else " below")


@lru_cache(maxsize=4)
def subspace(k, is_shared):
    builder = SubspaceBuilder(k, share=kind if is_shared else None)
    fitted = builder.fit(AdapterCollection.from_pretrained(related_adapters())).subspace_
    return PrincipalSubspace({module: fitted[module] for module in MODULES}, info=fitted.info)


def eigenlora(k, r, *, is_shared=False, is_random=False):
    def adapt(base, seed):
        bases = subspace(k, is_shared)
        bases = random_subspace(like=bases, seed=seed) if is_random else bases
        return get_peft_model(base, EigenLoraConfig(subspace=bases, r=r, lora_alpha=2 * r, task_type="SEQ_CLS"))

    return adapt


def shards(r, **settings):
    def adapt(base, seed):
        config = ShardLoraConfig(
            r=r, lora_alpha=2 * r, target_modules=MODULES, task_type="SEQ_CLS", seed=seed, **settings
        )
        return get_peft_model(base, config)

    return adapt


def of_peft(config):
    return lambda base, seed: get_peft_model(base, config(seed))


METHODS = {
    "LoRA r2": (
        of_peft(lambda seed: LoraConfig(r=2, lora_alpha=4, target_modules=MODULES, task_type="SEQ_CLS")),
        LORA_RATES,
    ),
    "own banks K96": (eigenlora(96, 8), COEFFICIENT_RATES),
    "shared banks K96": (eigenlora(96, 8, is_shared=True), COEFFICIENT_RATES),
    "shared banks K192": (eigenlora(192, 4, is_shared=True), COEFFICIENT_RATES),
    "random shared banks K96": (eigenlora(96, 8, is_shared=True, is_random=True), COEFFICIENT_RATES),
    "MoS": (shards(4, pool_rank=2, private_rank=1, shards_per_vector=4), LORA_RATES),
    "common A": (shards(3, sharing="input"), LORA_RATES),
    "Uni-LoRA": (
        of_peft(
            lambda seed: UniLoraConfig(
                r=4, theta_d_length=9216, proj_seed=seed, target_modules=MODULES, task_type="SEQ_CLS"
            )
        ),
        (3e-3, 1e-2),
    ),
    "VB-LoRA": (
        of_peft(
            lambda seed: VBLoRAConfig(
                r=4, num_vectors=34, vector_length=128, target_modules=MODULES, task_type="SEQ_CLS"
            )
        ),
        (1e-2, 3e-2),
    ),
    "TinyLoRA": (
        of_peft(
            lambda seed: TinyLoraConfig(r=40, u=1536, projection_seed=seed, target_modules=MODULES, task_type="SEQ_CLS")
        ),
        (3e-3, 1e-2),
    ),
    "head": (lambda base, seed: head_only(base, None), (1e-1, 3e-1)),
}
"""Name to (what makes the model, rates tried)."""


def customers_of(data):
    """A tuning customer of intents that the zoo has seen, and the targets, of intents that it has not."""
    halves = customers._halves(data)
    seen, unseen = list(halves["bank_a"]), halves["bank_b"]
    random.Random("shared_training").shuffle(seen)
    cut = {"tune": seen[:N_INTENTS]}
    cut |= {f"target_{i}": unseen[i * N_INTENTS : (i + 1) * N_INTENTS] for i in range(N_TARGETS)}
    return {name: customers.Customer(name, "banking77", tuple(own), "banking", "bank_a") for name, own in cut.items()}


def key(row):
    return row["target"], row["seed"], row["method"], row["rate"]


def run(cell, found, data):
    rows = customers.rows_of_target(found[cell["target"]], n_rows=N_ROWS, seed=cell["seed"], data=data)
    task, (adapt, _) = training.tokenized(*rows), METHODS[cell["method"]]
    torch.manual_seed(cell["seed"])
    start = time.process_time()
    model = adapt(training.fresh_base(task.n_labels, seed=cell["seed"]), cell["seed"]).eval()
    head_rate = cell["rate"] if cell["method"] == "head" else HEAD_RATE_BESIDE_ADAPTER
    numbers, _ = training.train(model, task, rate=cell["rate"], head_rate=head_rate, steps=STEPS, seed=cell["seed"])
    right = training.accuracy(model, task.test_ids, task.test_labels)
    measured = {"accuracy": round(right, 5), "n_test": len(task.test_ids), "parameters": numbers}
    return {**cell, **measured, "cpu_seconds": round(time.process_time() - start, 1), "environment": environment()}


def chosen_rate(rows, method):
    """Of the highest accuracy on the tuning customer; of equal ones the lowest."""
    tried = {row["rate"]: row["accuracy"] for row in rows if (row["target"], row["method"]) == ("tune", method)}
    return max(sorted(tried), key=tried.__getitem__)


def fill(data, work, methods):
    path, found = work / RESULTS.name, customers_of(data)
    work.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    done = {key(row) for row in rows}
    tuning = [
        {"target": "tune", "seed": TUNING_SEED, "method": method, "rate": rate}
        for method in methods
        for rate in METHODS[method][1]
    ]

    def fill_in(cells):
        for cell in cells:
            if key(cell) not in done:
                row = run(cell, found, data)
                append(path, row)
                rows.append(row)
                done.add(key(row))
                told = f"{cell['target']:9} {cell['seed']:3} {cell['method']:24} {cell['rate']:<6g}"
                print(f"{time.strftime('%H:%M:%S')} {told} {row['accuracy']:.3f} {row['cpu_seconds']} s", flush=True)

    fill_in(tuning)
    # All methods of one (target, seed) before the next, so that what has finished can be compared.
    fill_in(
        {"target": f"target_{i}", "seed": seed, "method": method, "rate": chosen_rate(rows, method)}
        for seed in SEEDS
        for i in range(N_TARGETS)
        for method in methods
    )


def report(rows):
    """Rows of the table: numbers, rate, mean accuracy, and the paired difference to LoRA with its interval over targets."""
    by_method = {}
    for row in rows:
        if row["target"].startswith("target"):
            by_method.setdefault(row["method"], {}).setdefault(row["target"], {})[row["seed"]] = row["accuracy"]
    lines = [
        "| method | numbers | rate | accuracy | minus LoRA r2 | minus shared banks K96 | cells |",
        "|" + "---|" * 7,
    ]
    for method, found in by_method.items():
        own = [row for row in rows if row["method"] == method and row["target"].startswith("target")]
        mean, error, _ = interval([fmean(seeds.values()) for seeds in found.values()])
        against = [
            shown(list(gaps(found, by_method.get(other, {})).values())) if method != other else ""
            for other in ("LoRA r2", "shared banks K96")
        ]
        numbers, rate = f"{own[0]['parameters']:,}", f"{own[0]['rate']:g}"
        lines.append(
            f"| {method} | {numbers} | {rate} | {mean:.3f} ± {error:.3f} | {against[0]} | {against[1]} | {len(own)} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        source = given.work / RESULTS.name if given.work else RESULTS
        rows = read(source)
        if given.work:
            RESULTS.write_text(source.read_text())
        print(report(rows))
        return
    quiet()
    fill(given.data, given.work, given.methods)


if __name__ == "__main__":
    main()
