"""A cell of recycling.py and recycling_smollm2.py, `recycle` or a fixed strategy on one target; their loop, tables and options."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "regimes"))

import torch  # noqa: E402
from compare import gaps, interval, shown  # noqa: E402
from peft import PeftModel  # noqa: E402
from run import append, environment, read  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from eigenpeft.recycling import CANDIDATES, recycle  # noqa: E402
from eigenpeft.recycling.candidates import NEAREST, Sources, learning_rates_of  # noqa: E402
from eigenpeft.recycling.preparing import prepared  # noqa: E402
from eigenpeft.recycling.search import Search  # noqa: E402
from eigenpeft.subspace import random_subspace  # noqa: E402


class RandomMean(Sources):
    """Sources whose mean update has no direction of the adapters: random factors of its norm and rank, module by module."""

    @cached_property
    def merged(self):
        mean, generator, factors = super().merged, torch.Generator().manual_seed(self.seed), {}
        for module, (left, right) in mean.factors.items():
            b, a = (torch.randn(each.shape, generator=generator) for each in (left, right))
            factors[module] = (b * ((left @ right).norm() / (b @ a).norm()), a)
        return replace(mean, factors=factors)


class RandomDirections(Sources):
    """Sources whose subspace has the size of the adapters' and none of their directions."""

    @cached_property
    def subspace(self):
        return random_subspace(like=super().subspace, seed=self.seed)


@dataclass(frozen=True)
class Strategy:
    """A candidate of `recycle`, trained without a search: its learning rate, what it is made of, whether it uses adapters."""

    candidate: str
    learning_rate: float
    sources: type[Sources] = Sources
    uses_adapters: bool = True


class Target:
    """One new task: a name, rows as the trainer takes them, and what makes batches of them; `base` and `measured` are its own."""

    task_type: str
    steps: int
    batch_size: int

    def __init__(self, name: str, *, seed: int, rows: Sequence[dict], collator: Callable):
        self.name, self.seed, self.rows, self.collator = name, seed, rows, collator

    def base(self) -> Any:
        """The base model with the task's head."""
        raise NotImplementedError

    def measured(self, model: Any) -> dict[str, float]:
        """Accuracy on the test rows, and what else is kept of a trained model."""
        raise NotImplementedError

    def args(self, folder: str) -> TrainingArguments:
        return TrainingArguments(
            folder,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            seed=self.seed,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )


def searched(target: Target, adapters: Any, folder: Path) -> dict:
    """`recycle` with its defaults: its result, its winner, its trials and its cost in trainings."""
    with tempfile.TemporaryDirectory() as scratch:
        report = recycle(
            adapters,
            make_model=target.base,
            rows=target.rows,
            args=target.args(scratch),
            out_dir=folder,
            data_collator=target.collator,
            task_type=target.task_type,
            progress=False,
        )
    found = target.measured(PeftModel.from_pretrained(target.base(), folder / "adapter"))
    trials = [
        {"candidate": t.candidate, "rate": t.learning_rate, "steps": t.steps, "loss": round(t.loss, 4)}
        for t in report.trials
    ]
    cost = round(sum(trial.steps for trial in report.trials) / target.steps + 1, 2)
    return {**found, "winner": report.winner, "rate": report.learning_rate, "cost": cost, "trials": trials}


def fixed(target: Target, adapters: Any, strategy: Strategy) -> dict:
    """One candidate, trained on all rows at one rate."""
    with tempfile.TemporaryDirectory() as scratch:
        search = Search(
            target.base,
            target.rows,
            target.rows,
            target.args(scratch),
            target.collator,
            Trainer,
            learning_rates_of(tuple(CANDIDATES), task_type=target.task_type),
            head_learning_rate=3e-2,
            log=Path(scratch) / "trials.jsonl",
            deadline=float("inf"),
        )
        sources = strategy.sources(adapters, 8, 1.0, target.task_type, target.seed, adapters.names[0])
        if strategy.candidate == NEAREST:  # the one that `recycle` would continue
            sources = prepared(search, sources, [NEAREST], steps=4)
        trained = {"learning_rate": strategy.learning_rate, "steps": target.steps, "rows": target.rows}
        model = search.trained(strategy.candidate, sources, **trained)
    return {**target.measured(model), "rate": strategy.learning_rate, "cost": 1.0}


def fill(
    path: Path,
    targets: Iterable[Target],
    *,
    names: Sequence[str],
    strategies: Mapping[str, Strategy],
    kinds: Sequence[str],
    zoo: Callable[[str, Target], Any],
) -> None:
    """Run what is missing; `zoo` gives the adapters of a kind for a target."""
    done = {(row["target"], row["zoo"], row["strategy"], row.get("seed", 0)) for row in read(path)}
    for target, kind, name in ((target, kind, name) for target in targets for kind in kinds for name in names):
        place = kind if name == "recycle" or strategies[name].uses_adapters else None
        if (target.name, place, name, target.seed) in done:
            continue
        adapters = zoo(kind, target)
        start = time.process_time()
        if name == "recycle":
            found = searched(target, adapters, path.parent / "runs" / f"{target.name}-{kind}-{target.seed}")
        else:
            found = fixed(target, adapters, strategies[name])
        row = {"target": target.name, "zoo": place, "strategy": name, "seed": target.seed, **found}
        row |= {"cpu_seconds": round(time.process_time() - start, 1), "environment": environment()}
        append(path, row)
        done.add((target.name, place, name, target.seed))
        print(time.strftime("%H:%M:%S"), target.name, kind, name, target.seed, found, row["cpu_seconds"], flush=True)


def options(doc: str, strategies: Mapping[str, Strategy]) -> argparse.ArgumentParser:
    """What both benchmarks take on the command line."""
    parser, names = argparse.ArgumentParser(description=doc.splitlines()[0]), ["recycle", *strategies]
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--strategies", nargs="*", default=names, choices=names)
    parser.add_argument("--zoos", nargs="*", default=["related", "unrelated"], choices=("related", "unrelated"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--report", action="store_true")
    return parser


def publish(work: Path | None, results: Path) -> None:
    """Print the tables of the published rows, after those of a work folder were put in their place."""
    if work:
        results.write_text((work / results.name).read_text())
    print(report([json.loads(line) for line in results.read_text().splitlines()]))


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
