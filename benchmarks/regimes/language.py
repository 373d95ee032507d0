"""When does recycling pay on a language model? Related and unrelated zoos of customers on SmolLM2-135M, beside their controls.

Papers:    EigenLoRAx, arXiv 2502.04700; LoRA, arXiv 2106.09685.
Command:   python benchmarks/regimes/language.py --model MODEL --data DIR --work DIR
           python benchmarks/regimes/language.py --work DIR --report [--docs docs/regimes.md]
           (MODEL is `smollm2/model` as `make smollm2` writes it; DIR of data holds banking77/ and clinc150/, JSONL)
Hardware:  CPU, one thread, float32; 20 to 40 s of CPU time per cell and per adapter of a zoo.
Writes:    WORK/zoos (an encoder's adapters of the same customers need another WORK) and WORK/language.jsonl, a line per cell.
           Started again, it goes on where it stopped, at first from benchmarks/results/regimes/language.jsonl, which --report
           writes.

The customers, zoos and targets are those of clinc150 in customers.py. The task is generation: from "Customer: ... Intent:" the
model writes the intent's name and the end of the text; a row is right if all of its tokens are. Adapters are in q and v of
the upper 8 of the 30 layers; what lies below is computed once. There is no head, so that "base" and "merged" train nothing.
Rates are chosen on the two tuning customers of banking77 by the held-out loss. λ is that of the lowest loss on the training rows,
which nothing has been trained on yet.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import customers
import torch
import zoos
from compare import gaps, shown
from customers import Customer
from peft import LoraConfig, get_peft_model
from run import RESULTS, append, environment, quiet, read
from torch import nn

from eigenpeft import EigenLoraConfig
from eigenpeft.subspace import random_subspace
from eigenpeft.tuners import same_parameters_lora

sys.path.append(str(Path(__file__).parents[1] / "study"))
from causal import judge, train  # noqa: E402
from causal_tasks import Halves, Task  # noqa: E402
from methods import subspace_of  # noqa: E402

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECTIONS = ["q_proj", "v_proj"]
N_UPPER, SIZE, N_ROWS, N_TEST, STEPS, BATCH_SIZE, TUNING_SEED = 8, 10, 64, 100, 30, 8, 100
ZOO_STEPS, ZOO_RATE, ZOO_ROWS_PER_INTENT = 40, 3e-3, 25
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Zoo:
    """Adapters that a method may use: a zoo's name, its size and where it lies."""

    name: str
    size: int
    work: Path

    @property
    def part(self) -> tuple[str, int, int, Path]:
        return self.name, self.size, 0, self.work


@dataclass(frozen=True)
class Method:
    """One way to adapt: its adapter, the rates tried for it, or the rate or method whose rate it takes; whether it uses a zoo."""

    configure: Callable[[Zoo, int], LoraConfig | EigenLoraConfig] | None
    rates: tuple[float, ...] = ()
    tuned_as: str | None = None
    rate: float | None = None
    uses_zoo: bool = True
    merged: bool = False


def eigenlora(zoo: Zoo, seed: int, *, random: bool = False) -> EigenLoraConfig:
    subspace = subspace_of(*zoo.part, 8)
    if random:
        subspace = random_subspace(like=subspace, seed=seed)
    return EigenLoraConfig(subspace=subspace, r=8, lora_alpha=16, task_type="CAUSAL_LM")


def random_eigenlora(zoo: Zoo, seed: int) -> EigenLoraConfig:
    return eigenlora(zoo, seed, random=True)


def upper_lora(zoo: Zoo, seed: int) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")


def equal_lora(zoo: Zoo, seed: int) -> LoraConfig:
    config = same_parameters_lora(subspace_of(*zoo.part, 8), r=8)
    config.task_type = "CAUSAL_LM"
    return config


METHODS = {
    "base": Method(None, uses_zoo=False),
    "merged": Method(None, merged=True),
    "EigenLoRA K8": Method(eigenlora, (3e-2, 1e-1, 3e-1)),
    "random K8": Method(random_eigenlora, (1e-1, 3e-1, 1.0), uses_zoo=False),
    "LoRA equal": Method(equal_lora, (3e-2, 1e-1, 3e-1), uses_zoo=False),
    "LoRA r8": Method(upper_lora, (3e-3, 1e-2, 3e-2), uses_zoo=False),
    "merged, EigenLoRA K8": Method(eigenlora, tuned_as="EigenLoRA K8", merged=True),
    "merged, LoRA r8": Method(upper_lora, tuned_as="LoRA r8", merged=True),
    # Added after LoRA r 8 had diverged on a target at the rate that was best on the tuning customers.
    "LoRA r8, lower rate": Method(upper_lora, rate=1e-2, uses_zoo=False),
    "merged, LoRA r8, lower rate": Method(upper_lora, rate=1e-2, merged=True),
}
TUNED = tuple(name for name, method in METHODS.items() if method.rates)
RECYCLED = ("EigenLoRA K8", "merged", "merged, EigenLoRA K8", "merged, LoRA r8")
LOWER = ("LoRA r8, lower rate", "merged, LoRA r8, lower rate")
PRIMARY = tuple(name for name in METHODS if name not in LOWER)
# (stage, kind of zoo, size, methods, seeds), in order of value
PLAN = (
    ("tune", "own", SIZE, TUNED, (TUNING_SEED,)),
    ("test", "own", SIZE, PRIMARY, (0,)),
    ("test", "own", SIZE, LOWER, (0,)),
    ("test", "other", SIZE, RECYCLED[:2] + LOWER[1:], (0,)),
    ("test", "own", 5, RECYCLED[:2] + LOWER[1:], (0,)),
    ("test", "own", SIZE, tuple(METHODS), (1,)),
)
PAIRS = (
    ("EigenLoRA K8", "LoRA equal"),
    ("EigenLoRA K8", "LoRA r8"),
    ("EigenLoRA K8", "random K8"),
    ("EigenLoRA K8", "base"),
    ("merged", "LoRA r8"),
    ("merged", "base"),
    ("merged, EigenLoRA K8", "LoRA r8"),
    ("merged, EigenLoRA K8", "EigenLoRA K8"),
    ("merged, LoRA r8", "LoRA r8"),
    ("EigenLoRA K8", "LoRA r8, lower rate"),
    ("merged, EigenLoRA K8", "LoRA r8, lower rate"),
    ("merged, LoRA r8, lower rate", "LoRA r8, lower rate"),
    ("LoRA r8, lower rate", "base"),
)
KINDS = {("own", SIZE): f"{SIZE} relatives", ("own", 5): "5 relatives", ("other", SIZE): f"{SIZE} of other domains"}


class Slice:
    """The cells of a work folder: which exist, and how a missing one is run."""

    def __init__(self, *, model: Path, data: Path, work: Path):
        self.data, self.work, self.path = data, work, work / "language.jsonl"
        (work / "zoos").mkdir(parents=True, exist_ok=True)
        published = RESULTS / "language.jsonl"
        if not self.path.exists() and published.exists():
            self.path.write_text(published.read_text())
        self.rows, self.halves = read(self.path), Halves(model, n_upper=N_UPPER, dtype=torch.float32)
        self.customers = {c.name: c for c in (*customers.targets(data), *customers.tuning_customers(data))}
        self.task, self.scale = lru_cache(maxsize=2)(self._task), lru_cache(maxsize=None)(self._scale)

    def _encoded(self, parts: tuple[customers.Rows, customers.Rows], customer: Customer) -> Task:
        def rows(own: customers.Rows) -> list[dict]:
            names = [intent.replace("_", " ").lower() for intent in customer.intents]
            texts = zip(own.texts, own.labels, strict=True)
            return [{"prompt": f"Customer: {t}\nIntent:", "completion": f" {names[label]}"} for t, label in texts]

        train, test = parts
        return Task(customer.name, self.halves.encode(rows(train)), self.halves.encode(rows(test)[:N_TEST]))

    def _task(self, target: str, seed: int) -> Task:
        customer = self.customers[target]
        return self._encoded(customers.rows_of_target(customer, n_rows=N_ROWS, seed=seed, data=self.data), customer)

    def train_zoo(self, zoo: Zoo) -> None:
        """Train the adapters of a zoo that are not there yet."""
        for customer in zoos.missing_members(zoo.name, zoo.size, data=self.data, work=self.work):
            parts = customers.rows_of_member(customer, self.data, per_intent=ZOO_ROWS_PER_INTENT)
            train_rows, test_rows = parts
            few = customers.Rows(test_rows.texts[:40], test_rows.labels[:40])
            task, seed = self._encoded((train_rows, few), customer), zoos.seed_of(customer)
            torch.manual_seed(seed)
            model = get_peft_model(self.halves.upper(), upper_lora(zoo, seed))
            found = train(
                model, task, rate=ZOO_RATE, seed=seed, steps=ZOO_STEPS, batch_size=BATCH_SIZE, judged_every=ZOO_STEPS
            )
            model.peft_config["default"].base_model_name_or_path = BASE_NAME
            unfinished = self.work / "zoos" / f".{customer.name}"
            model.save_pretrained(unfinished)
            unfinished.rename(self.work / "zoos" / customer.name)
            self._say(f"zoo {customer.name}", found)

    def _say(self, what: str, found: dict) -> None:
        took = found.get("cpu_seconds", "")
        print(f"{time.strftime('%H:%M:%S')} {what:60} {found['loss']:.3f} {found['exact']:.3f} {took}", flush=True)

    def rate(self, name: str) -> float | None:
        """The rate of the lowest mean held-out loss on the tuning customers."""
        if METHODS[name].rate:
            return METHODS[name].rate
        name, losses = METHODS[name].tuned_as or name, {}
        for row in self.rows:
            if row["stage"] == "tune" and row["method"] == name and row["rate"] in METHODS[name].rates:
                losses.setdefault(row["rate"], []).append(row["loss"])
        return min(sorted(losses), key=lambda rate: fmean(losses[rate])) if losses else None

    def merged_base(self, zoo: Zoo, scale: float) -> nn.Module:
        """The base with λ times the zoo's mean update."""
        model = self.halves.upper()
        with torch.no_grad():
            for module, update in zoos.mean_update(*zoo.part).items():
                model.get_submodule(module).weight.add_(update, alpha=scale)
        return model

    def _scale(self, target: str, seed: int, zoo: Zoo) -> float:
        """λ of the lowest loss on the training rows."""
        task = self.task(target, seed)
        seen = Task(task.name, task.train, task.train)
        return min(SCALES, key=lambda scale: judge(self.merged_base(zoo, scale), seen)[0])

    def cells(self, plan: tuple) -> list[dict]:
        """The cells of one line of the plan, those of a target together."""
        stage, kind, size, names, seeds = plan
        found = []
        for seed in seeds:
            for customer in self.customers.values():
                if (stage == "tune") != customer.name.startswith("tune_") or (
                    stage == "test" and customer.source != "clinc150"
                ):
                    continue
                own = customer.relatives
                zoo = own if kind == "own" else own[:-1] + {"a": "b", "b": "a"}[own[-1]]
                if stage == "tune":  # no adapter of banking77 is trained here
                    zoo = {"bank_a": "clinc_a", "bank_b": "clinc_b"}[zoo]
                for name in names:
                    uses = METHODS[name].uses_zoo
                    common = {"stage": stage, "target": customer.name, "seed": seed, "method": name}
                    common |= {
                        "zoo": zoo if uses else None,
                        "kind": kind if uses else None,
                        "size": size if uses else 0,
                    }
                    for rate in METHODS[name].rates if stage == "tune" else (self.rate(name),):
                        found.append({**common, "rate": rate})
        return found

    def run(self, cell: dict) -> dict:
        """Train and judge one cell."""
        method, task = METHODS[cell["method"]], self.task(cell["target"], cell["seed"])
        zoo = Zoo(
            cell["zoo"] or self.customers[cell["target"]].relatives.replace("bank", "clinc"),
            cell["size"] or SIZE,
            self.work,
        )
        self.train_zoo(zoo)
        more = {}
        if method.merged:
            more["scale"] = self.scale(cell["target"], cell["seed"], zoo)
        base = self.merged_base(zoo, more["scale"]) if method.merged else self.halves.upper()
        if method.configure is None:
            loss, exact = judge(base, task)
            return {"loss": loss, "exact": exact, "parameters": 0, **more}
        torch.manual_seed(cell["seed"])
        model = get_peft_model(base, method.configure(zoo, cell["seed"]))
        sizes = {"steps": STEPS, "batch_size": BATCH_SIZE, "judged_every": STEPS}
        found = train(model, task, rate=cell["rate"], seed=cell["seed"], **sizes)
        kept = {name: found[name] for name in ("loss", "exact", "parameters", "cpu_seconds")}
        return {**kept, **more, "steps": STEPS, "batch_size": BATCH_SIZE}

    def fill(self, plan: tuple) -> None:
        for cell in self.cells(plan):
            if any(cell.items() <= row.items() for row in self.rows):
                continue
            row = {**cell, **self.run(cell), "n_test": len(self.task(cell["target"], cell["seed"]).test)}
            row["environment"] = environment()
            append(self.path, row)
            self.rows.append(row)
            where = (
                f"{cell['kind'] or ''} {cell['size']} {cell['target']} {cell['seed']} {cell['method']} {cell['rate']}"
            )
            self._say(where, row)


def values(rows: list[dict], name: str, kind: str, size: int, *, what: str = "exact") -> dict[str, dict[int, float]]:
    """Target to seed to accuracy or loss."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["stage"] == "test" and row["method"] == name and (row["kind"], row["size"]) in ((kind, size), (None, 0)):
            found.setdefault(row["target"], {})[row["seed"]] = row[what]
    return found


def tables(rows: list[dict]) -> dict[str, str]:
    """Means of the methods with ten relatives, and the differences for each zoo."""
    lines = ["| method | trained numbers | rate | exact | loss |", "|---|---|---|---|---|"]
    for name in METHODS:
        right, loss = (values(rows, name, "own", SIZE, what=what) for what in ("exact", "loss"))
        if right:
            own = [row for row in rows if row["method"] == name and row["stage"] == "test"]
            means = [fmean(fmean(by_seed.values()) for by_seed in each.values()) for each in (right, loss)]
            rate = f"{own[0]['rate']:g}" if own[0]["rate"] else ""
            lines.append(f"| {name} | {own[0]['parameters']:,} | {rate} | {means[0]:.3f} | {means[1]:.3f} |")
    found = {"language": "\n".join(lines)}
    kinds = {kind: title for kind, title in KINDS.items() if values(rows, "EigenLoRA K8", *kind)}
    lines = ["| comparison, points of accuracy | " + " | ".join(kinds.values()) + " |", "|---" * (1 + len(kinds)) + "|"]
    for one, other in PAIRS:
        gains = [
            shown(list(gaps(values(rows, one, *kind), values(rows, other, *kind)).values()))
            if METHODS[one].uses_zoo or kind == ("own", SIZE)
            else ""
            for kind in kinds
        ]
        lines.append("| " + " | ".join([f"{one} minus {other}", *gains]) + " |")
    return found | {"language-pairs": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    quiet()
    if given.report:
        rows = read(given.work / "language.jsonl")
        once = [{key: value for key, value in row.items() if key != "environment"} for row in rows[1:]]
        text = "".join(json.dumps(row) + "\n" for row in [*rows[:1], *once])
        (RESULTS / "language.jsonl").write_text(text, encoding="utf-8")
        for name, text in tables(rows).items():
            print(text, end="\n\n")
            if given.docs:
                page = given.docs.read_text(encoding="utf-8")
                mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
                given.docs.write_text(mark.sub(lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page), encoding="utf-8")
        return
    if given.model is None or given.data is None:
        parser.error("--model and --data are needed to run cells; --report needs neither")
    slice_ = Slice(model=given.model, data=given.data, work=given.work)
    for plan in PLAN:
        slice_.fill(plan)


if __name__ == "__main__":
    main()
