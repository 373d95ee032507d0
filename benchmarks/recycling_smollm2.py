"""Does `recycle` choose well on a language model? The customers of the study of regimes as generation, beside fixed strategies.

Command:   python benchmarks/recycling_smollm2.py --model MODEL --data DIR --work WORK [--seeds 0 1 2]
           python benchmarks/recycling_smollm2.py --report [--work WORK]
           (MODEL is `smollm2/model` as `make smollm2` writes it; DIR of data holds clinc150/, JSONL)
Hardware:  CPU, one thread, float32; 25 s per adapter of a zoo, and five minutes per target and seed.
Writes:    WORK/zoos, as regimes/language.py has them, and WORK/recycling_smollm2.jsonl (a line per target, seed and strategy);
           started again, it goes on where it stopped. --report prints the tables and copies the lines to
           benchmarks/results/recycling_smollm2.jsonl.

SmolLM2-135M-Instruct writes a customer's intent; a test row is right if every token is. Rows, adapters, steps and the place of the
LoRAs are those of regimes/language.py. Related: ten adapters, two of the target's own domain. Unrelated: ten adapters of five
other domains. `recycle` has its defaults; every fixed strategy is one candidate of it, trained on all 64 rows for 30 steps by the
same code, at the first learning rate that `recycle` has for it; merged starts take λ = 1. Which candidates a language model's
search begins with was settled on the two tuning customers of banking77, which are no targets.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "regimes"), str(HERE / "study")]

import language  # noqa: E402
import torch  # noqa: E402
import zoos  # noqa: E402
from causal import judge  # noqa: E402
from causal_tasks import Row, pack  # noqa: E402
from peft import PeftModel  # noqa: E402
from run import append, environment, quiet, read  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from eigenpeft.recycling import CANDIDATES, recycle  # noqa: E402
from eigenpeft.recycling.candidates import LANGUAGE, Sources, learning_rates_of  # noqa: E402
from eigenpeft.recycling.search import Search  # noqa: E402
from eigenpeft.subspace import random_subspace  # noqa: E402
from recycling import RANDOM_MEAN, RandomMean, report  # noqa: E402

RESULTS = HERE / "results" / "recycling_smollm2.jsonl"
STEPS, SIZE = language.STEPS, language.SIZE
RATES = learning_rates_of(tuple(CANDIDATES), task_type=LANGUAGE)
FIXED = ("lora_r8", "merged_lora_r8", "init", "eigenlora", "merged_eigenlora", "same_parameters", "random_subspace")
# A fresh LoRA at the next higher rate, so that it is not judged at one rate alone.
HIGHER_RATE, HIGHER = "lora_r8 at 0.03", 3e-2
RANDOM_INIT = "init at random directions"
WITHOUT_ADAPTERS = ("lora_r8", HIGHER_RATE)


class RandomDirections(Sources):
    """Sources whose subspace has the size of the adapters' and none of their directions."""

    @cached_property
    def subspace(self):
        return random_subspace(like=super().subspace, seed=self.seed)


class Target:
    """One customer: rows as the trainer takes them, the model's upper layers, and what judges the result."""

    def __init__(self, slice_: language.Slice, name: str, *, seed: int):
        self.name, self.seed, self.task, self.halves = name, seed, slice_.task(name, seed), slice_.halves
        self.rows = [{"tokens": row.tokens, "n_prompt": row.n_prompt, "hidden": row.hidden} for row in self.task.train]

    def base(self):
        return self.halves.upper()

    @staticmethod
    def collator(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Rows one behind the other; only the answers' tokens get logits, beside which their labels stand already."""
        batch = pack([Row(**row) for row in rows])
        return {
            "inputs_embeds": batch.hidden,
            "position_ids": batch.positions,
            "logits_to_keep": batch.before_answer,
            "labels": batch.answer[None],
            "shift_labels": batch.answer[None],
        }

    def args(self, folder: str) -> TrainingArguments:
        return TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=language.BATCH_SIZE,
            seed=self.seed,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )

    def measured(self, model) -> dict[str, float]:
        loss, exact = judge(model, self.task)
        return {"accuracy": exact, "loss": loss}


def searched(target: Target, adapters, folder: Path) -> dict:
    """`recycle` with its defaults: its result's accuracy, its winner and its cost in trainings."""
    with tempfile.TemporaryDirectory() as scratch:
        report = recycle(
            adapters,
            make_model=target.base,
            rows=target.rows,
            args=target.args(scratch),
            out_dir=folder,
            data_collator=target.collator,
            task_type=LANGUAGE,
            progress=False,
        )
    found = target.measured(PeftModel.from_pretrained(target.base(), folder / "adapter"))
    trials = [
        {"candidate": t.candidate, "rate": t.learning_rate, "steps": t.steps, "loss": round(t.loss, 4)}
        for t in report.trials
    ]
    cost = round(sum(trial.steps for trial in report.trials) / STEPS + 1, 2)
    return {**found, "winner": report.winner, "rate": report.learning_rate, "cost": cost, "trials": trials}


def fixed(target: Target, adapters, name: str) -> dict:
    """One candidate, trained on all rows at its first rate."""
    candidate = {HIGHER_RATE: "lora_r8", RANDOM_MEAN: "merged_lora_r8", RANDOM_INIT: "init"}.get(name, name)
    rate = HIGHER if name == HIGHER_RATE else RATES[candidate][0]
    with tempfile.TemporaryDirectory() as scratch:
        search = Search(
            target.base,
            target.rows,
            target.rows,
            target.args(scratch),
            target.collator,
            Trainer,
            RATES,
            head_learning_rate=3e-2,
            log=Path(scratch) / "trials.jsonl",
            deadline=float("inf"),
        )
        kind = {RANDOM_MEAN: RandomMean, RANDOM_INIT: RandomDirections}.get(name, Sources)
        sources = kind(adapters, 8, 1.0, LANGUAGE, target.seed, adapters.names[0])
        model = search.trained(candidate, sources, learning_rate=rate, steps=STEPS, rows=target.rows)
    return {**target.measured(model), "rate": rate, "cost": 1.0}


@lru_cache(maxsize=2)
def zoo(kind: str, relatives: str, slice_: language.Slice):
    """The ten adapters of the target's domains, or of the five others."""
    name = relatives if kind == "related" else relatives[:-1] + {"a": "b", "b": "a"}[relatives[-1]]
    wanted = language.Zoo(name, SIZE, slice_.work)
    slice_.train_zoo(wanted)
    return zoos.collection(*wanted.part)


def fill(
    slice_: language.Slice, path: Path, *, targets: list[str], strategies: list[str], seeds: list[int], kinds: list[str]
) -> None:
    """Run what is missing, one seed after the other."""
    done = {(row["target"], row["zoo"], row["strategy"], row["seed"]) for row in read(path)}
    for seed, name in ((seed, name) for seed in seeds for name in targets):
        target = Target(slice_, name, seed=seed)
        for kind, strategy in ((kind, strategy) for kind in kinds for strategy in strategies):
            place = None if strategy in WITHOUT_ADAPTERS else kind
            if (name, place, strategy, seed) in done:
                continue
            adapters = zoo(kind, slice_.customers[name].relatives, slice_)
            start = time.process_time()
            if strategy == "recycle":
                found = searched(target, adapters, path.parent / "runs" / f"{name}-{kind}-{seed}")
            else:
                found = fixed(target, adapters, strategy)
            row = {"target": name, "zoo": place, "strategy": strategy, "seed": seed, **found}
            row |= {"cpu_seconds": round(time.process_time() - start, 1), "environment": environment()}
            append(path, row)
            done.add((name, place, strategy, seed))
            print(time.strftime("%H:%M:%S"), name, kind, strategy, seed, found, row["cpu_seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    strategies = ["recycle", *FIXED, HIGHER_RATE, RANDOM_MEAN, RANDOM_INIT]
    parser.add_argument("--targets", nargs="*", help="default: the ten of clinc150")
    parser.add_argument("--strategies", nargs="*", default=strategies, choices=strategies)
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
    if given.model is None or given.data is None or given.work is None:
        parser.error("--model, --data and --work are needed to run cells; --report needs none of them")
    torch.set_num_threads(1)
    quiet()
    slice_ = language.Slice(model=given.model, data=given.data, work=given.work)
    every = [each.name for each in slice_.customers.values() if each.source == "clinc150"]
    fill(
        slice_,
        given.work / RESULTS.name,
        targets=given.targets or every,
        strategies=given.strategies,
        seeds=given.seeds,
        kinds=given.zoos,
    )


if __name__ == "__main__":
    main()
