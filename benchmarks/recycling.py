"""Does `recycle` choose well? New customers, 64 rows each, with related and with unrelated adapters, beside fixed strategies.

Command:   python benchmarks/recycling.py --data DIR --work DIR [--source clinc150 banking77] [--seeds 0 1 2]
           python benchmarks/recycling.py --report [--work DIR]
           (DIR of data holds clinc150/ and banking77/, JSONL)
Hardware:  CPU, one thread; about 10 CPU seconds per adapter of the two zoos, and two CPU minutes per target.
Writes:    WORK/zoos, WORK/recycling.jsonl (a line per target and strategy); started again, it goes on where it stopped.
           --report prints the tables and copies the lines to benchmarks/results/recycling.jsonl.

The targets are the ten clinc150 customers of the study of regimes (benchmarks/regimes/customers.py), seven intents of one
domain that no adapter has seen, and its eight of banking77. Related: 20 adapters of the target's zoo, of clinc150's four of
its own domain. Unrelated: the ten adapters
that ship with eigenpeft. `recycle` has its defaults and 40 steps; every fixed strategy is one candidate of `recycle` trained on
all 64 rows for 40 steps by the same code, at the rate that the study chose for it on customers that are no targets; merged
starts take λ = 1. Same rows, seed and head for all strategies of a target. Cost is in optimizer steps, in trainings of 40
steps.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "regimes"))

import customers  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import zoos  # noqa: E402
from compare import gaps, interval, shown  # noqa: E402
from peft import PeftModel  # noqa: E402
from run import append, environment, quiet, read  # noqa: E402
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments  # noqa: E402

from eigenpeft.recycling import recycle  # noqa: E402
from eigenpeft.recycling.candidates import Sources  # noqa: E402
from eigenpeft.recycling.preparing import prepared  # noqa: E402
from eigenpeft.recycling.search import Search  # noqa: E402

RESULTS = HERE / "results" / "recycling.jsonl"
N_ROWS, STEPS, SIZE = 64, 40, 20
# Rates that the study of regimes chose (docs/regimes.md); the merged LoRA takes that of the LoRA.
FIXED = {
    "lora_r8": 3e-3,
    "same_parameters": 1e-2,
    "eigenlora": 1e-2,
    "random_subspace": 1e-2,
    "nearest_continued": 3e-3,
    "merged_lora_r8": 3e-3,
    "merged_eigenlora": 1e-2,
}
# The control of the merged start: random factors, module by module of the mean update's norm and rank.
RANDOM_MEAN = "lora_r8 on a random update of that norm"
WITHOUT_ADAPTERS = ("lora_r8",)


class RandomMean(Sources):
    """Sources whose mean update has no direction of the adapters."""

    @cached_property
    def merged(self):
        mean, generator, factors = super().merged, torch.Generator().manual_seed(self.seed), {}
        for module, (left, right) in mean.factors.items():
            b, a = (torch.randn(each.shape, generator=generator) for each in (left, right))
            factors[module] = (b * ((left @ right).norm() / (b @ a).norm()), a)
        return replace(mean, factors=factors)


class Target:
    """One new task: rows, a base with a head, and what trains on them."""

    def __init__(self, customer: customers.Customer, data: Path, *, seed: int):
        rows = customers.rows_of_target(customer, n_rows=N_ROWS, seed=seed, data=data)
        self.seed, self.name, self.task = seed, customer.name, training.tokenized(*rows)
        labels = self.task.labels.tolist()
        self.rows = [{"input_ids": ids, "labels": label} for ids, label in zip(self.task.ids, labels, strict=True)]
        self.collator = DataCollatorWithPadding(training.tokenizer())

    def base(self):
        return training.fresh_base(self.task.n_labels, seed=self.seed)

    def args(self, folder: str) -> TrainingArguments:
        return TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=training.BATCH_SIZE,
            seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )

    def accuracy(self, model) -> float:
        return training.accuracy(model.eval(), self.task.test_ids, self.task.test_labels)


def searched(target: Target, adapters, folder: Path) -> dict:
    """`recycle` with its defaults; its accuracy, its winner and its cost in trainings of 40 steps."""
    with tempfile.TemporaryDirectory() as scratch:
        report = recycle(
            adapters,
            make_model=target.base,
            rows=target.rows,
            args=target.args(scratch),
            out_dir=folder,
            data_collator=target.collator,
            progress=False,
        )
    accuracy = target.accuracy(PeftModel.from_pretrained(target.base(), folder / "adapter"))
    cost = sum(trial.steps for trial in report.trials) / STEPS + 1
    return {"accuracy": accuracy, "winner": report.winner, "rate": report.learning_rate, "cost": round(cost, 2)}


def fixed(target: Target, adapters, name: str) -> dict:
    """One candidate, trained on all rows at its rate."""
    with tempfile.TemporaryDirectory() as scratch:
        search = Search(
            target.base,
            target.rows,
            target.rows,
            target.args(scratch),
            target.collator,
            Trainer,
            learning_rates={name: (rate,) for name, rate in FIXED.items()} | {"merged_head": (3e-1,)},
            head_learning_rate=3e-2,
            log=Path(scratch) / "trials.jsonl",
            deadline=float("inf"),
        )
        nearest = nearest_of(target, adapters, search) if name == "nearest_continued" else adapters.names[0]
        is_random = name == RANDOM_MEAN
        sources = (RandomMean if is_random else Sources)(adapters, 8, 1.0, "SEQ_CLS", target.seed, nearest)
        candidate = "merged_lora_r8" if is_random else name
        model = search.trained(candidate, sources, learning_rate=FIXED[candidate], steps=STEPS, rows=target.rows)
    return {"accuracy": target.accuracy(model), "rate": FIXED[candidate], "cost": 1.0}


def nearest_of(target: Target, adapters, search: Search) -> str:
    """The adapter that `recycle` would continue."""
    plain = Sources(adapters, 8, 1.0, "SEQ_CLS", target.seed, adapters.names[0])
    return prepared(search, plain, ["nearest_continued"], steps=4).nearest


@lru_cache(maxsize=2)
def zoo(kind: str, relatives: str, work: Path):
    return zoos.collection(*(("shipped", 10) if kind == "unrelated" else (relatives, SIZE)), 0, work)


def fill(
    data: Path, work: Path, *, strategies: list[str], sources: list[str], seeds: list[int], kinds: list[str]
) -> None:
    """Run what is missing, one seed after the other."""
    (work / "zoos").mkdir(parents=True, exist_ok=True)
    path = work / RESULTS.name
    done = {(row["target"], row["zoo"], row["strategy"], row.get("seed", 0)) for row in read(path)}
    wanted = [(seed, each) for seed in seeds for each in customers.targets(data) if each.source in sources]
    for seed, customer in wanted:
        for member in zoos.missing_members(customer.relatives, SIZE, data=data, work=work):
            zoos.train_member(member, data=data, folder=work / "zoos" / member.name)
        target = Target(customer, data, seed=seed)
        for kind in kinds:
            for strategy in strategies:
                place = None if strategy in WITHOUT_ADAPTERS else kind
                if (target.name, place, strategy, seed) in done:
                    continue
                start, adapters = time.process_time(), zoo(kind, customer.relatives, work)
                if strategy == "recycle":
                    found = searched(target, adapters, work / "runs" / f"{target.name}-{kind}-{seed}")
                else:
                    found = fixed(target, adapters, strategy)
                row = {"target": target.name, "zoo": place, "strategy": strategy, "seed": seed, **found}
                row |= {"cpu_seconds": round(time.process_time() - start, 1), "environment": environment()}
                append(path, row)
                done.add((target.name, place, strategy, seed))
                print(target.name, kind, strategy, seed, found, row["cpu_seconds"], flush=True)


def report(rows: list[dict]) -> str:
    """Mean accuracy of every strategy on each kind of zoo, and `recycle` minus each over targets, of which each has its seeds."""
    lines = []
    for source, kind in ((source, kind) for source in ("clinc150", "all") for kind in ("related", "unrelated")):
        found: dict[str, dict[str, dict[int, float]]] = {}
        own = [row for row in rows if source == "all" or not row["target"].startswith("new_bank_")]
        for row in own:
            if row["zoo"] in (None, kind):
                seeds = found.setdefault(row["strategy"], {}).setdefault(row["target"], {})
                seeds[row.get("seed", 0)] = row["accuracy"]
        chosen = [row for row in own if row["strategy"] == "recycle" and row["zoo"] == kind]
        if not chosen or (source == "all" and not has_banking(rows)):
            continue
        winners = [row["winner"] for row in chosen]
        lines += [
            "",
            f"{kind}, {source}: cost {fmean(row['cost'] for row in chosen):.1f} trainings; winners "
            + ", ".join(f"{name} {winners.count(name)}" for name in sorted(set(winners))),
            "",
            "| strategy | accuracy | recycle minus it, points | seeds |",
            "|---|---|---|---|",
        ]
        means = {name: [fmean(seeds.values()) for seeds in each.values()] for name, each in found.items()}
        for strategy in sorted(found, key=lambda name: -fmean(means[name])):
            mean, error, n = interval(means[strategy])
            beside = "" if strategy == "recycle" else shown(list(gaps(found["recycle"], found[strategy]).values()))
            counts = sorted({len(seeds) for seeds in found[strategy].values()})
            lines.append(
                f"| {strategy} | {mean:.3f} ± {error:.3f} ({n}) | {beside} | {' to '.join(map(str, counts))} |"
            )
    return "\n".join(lines)


def has_banking(rows: list[dict]) -> bool:
    return any(row["target"].startswith("new_bank_") for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    strategies = ["recycle", *FIXED, RANDOM_MEAN]
    parser.add_argument("--strategies", nargs="*", default=strategies, choices=strategies)
    parser.add_argument("--source", nargs="*", default=["clinc150"], choices=("clinc150", "banking77"))
    parser.add_argument("--zoos", nargs="*", default=["related", "unrelated"], choices=("related", "unrelated"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        source = given.work / RESULTS.name if given.work else RESULTS
        if given.work:
            RESULTS.write_text(source.read_text())
        print(report([json.loads(line) for line in source.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    quiet()
    fill(
        given.data,
        given.work,
        strategies=given.strategies,
        sources=given.source,
        seeds=given.seeds,
        kinds=given.zoos,
    )


if __name__ == "__main__":
    main()
