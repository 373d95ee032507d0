"""A real run of each trainer: SFT, DPO, reward and GRPO on SmolLM2-135M by the recipes, in a recycled subspace and beside it.

Papers:   EigenLoRAx, arXiv 2502.04700; SFT, DPO (2305.18290), reward models (2203.02155), GRPO (2402.03300) as TRL has them.
Command:  python benchmarks/smollm2.py --model MODEL --data DIR --work WORK [--runs zoo tune sft_t0 sft_gsm8k dpo reward grpo]
          (MODEL and DIR: see benchmarks/smollm2_data.py; WORK keeps the zoo, the subspace and all adapters)
          python benchmarks/smollm2_report.py   (figure and table)
Hardware: 1 CPU core with bf16 instructions; the 28 rows in the results took 14 minutes of CPU.
          Started again, it goes on where it stopped.
Writes:   benchmarks/results/smollm2.json, a row a run with its curves.

zoo       Six T0 tasks, one plain LoRA each (r 16, own seed), by recipes/sft.py; then recipes/build_subspace.py with K 32.
tune      Three learning rates a method on a T0 task that is neither in the zoo nor a target. The best is the method's rate for
          SFT and reward; DPO and GRPO take a third of it, whatever the method.
sft_t0    qasc: eight options and the fact that decides, 120 rows.      sft_gsm8k  320 short problems with worked answers.
dpo       Pairs as the simulated user "helpful" chose, last turn.       reward     The same pairs.
grpo      Sums of two numbers below 20 after two worked ones; reward: the last number of at most 8 tokens is right.

Methods: EigenLoRA on the zoo's subspace, the same on a random subspace of the same size, LoRA with as many parameters (r 1), LoRA
r 16. The same rows, order, steps and seed for all; one seed, so small differences mean nothing.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import get_type_hints

import smollm2_data
from timing import environment
from trl import TrlParser

RECIPES = Path(__file__).parents[1] / "recipes"
RESULTS = Path(__file__).parent / "results" / "smollm2.json"
ZOO = ("commonsense_qa", "sciq", "quarel", "glue_qqp", "glue_mrpc", "quartz")
TUNING_TASK, TARGET_TASK = "social_i_qa", "qasc"
METHODS = {
    "EigenLoRA": {"method": "eigenlora", "r": 16, "lora_alpha": 32},
    "LoRA r16": {"method": "lora", "r": 16, "lora_alpha": 32},
    "random subspace": {"method": "random", "r": 16, "lora_alpha": 32},
    "LoRA, equal parameters": {"method": "lora", "r": 1, "lora_alpha": 2},
}
COEFFICIENT_RATES, LORA_RATES = (3e-3, 1e-2, 3e-2), (5e-4, 2e-3, 8e-3)
N_COMPONENTS = 32
# What every run passes to its recipe besides the YAML beside it. TRL's own defaults (bf16 autocast) stay as they are.
COMMON = smollm2_data.ON_CPU | {
    "model_init_kwargs": '{"dtype": "bfloat16"}',
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "eval_on_start": True,
    "per_device_eval_batch_size": 8,
}


@dataclass(frozen=True)
class Run:
    """One trainer on one data set: its recipe, the rows, and the settings that differ from COMMON."""

    recipe: str
    rows: str
    steps: int
    batch_size: int
    settings: dict
    rate_factor: float = 1.0


RUNS = {
    "sft_t0": Run("sft", TARGET_TASK, 16, 4, {}),
    "reward": Run("reward", "helpful", 16, 4, {}),
    "grpo": Run(
        "grpo",
        "arithmetic",
        16,
        16,
        {
            "dataset_config": "default",
            "num_generations": 8,
            "max_completion_length": 8,
            "eval_strategy": "no",
            "eval_on_start": False,
        },
        rate_factor=1 / 3,
    ),
    "dpo": Run("dpo", "helpful", 12, 4, {"eval_on_start": False}, rate_factor=1 / 3),
    "sft_gsm8k": Run("sft", "gsm8k", 16, 4, {}),
}
ZOO_RUN = Run("sft", "", 24, 4, {"eval_strategy": "no", "eval_on_start": False})


def rows_of(name, data):
    """Train and test rows; the tuning task is judged on rows held out for that."""
    if name == "gsm8k":
        return smollm2_data.gsm8k(data, n_test=32)
    if name == "helpful":
        return smollm2_data.pairs(data, user="helpful", longest=240, n_test=32)
    if name == "arithmetic":
        return smollm2_data.arithmetic()
    return smollm2_data.t0(data, name, n_test=32 if name == TARGET_TASK else 48)


def load_recipe(name):
    """The recipe as a module, under a name of its own so that its dataclasses can be resolved."""
    spec = spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_recipe(name, settings):
    """`recipes/<name>.py --config recipes/<name>.yaml --<setting> <value> ...` in this process."""
    recipe = load_recipe(name)
    kinds = tuple(kind for key, kind in get_type_hints(recipe.main).items() if key != "return")
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", *flat(value))]
    recipe.main(*TrlParser(kinds).parse_args_and_config(["--config", str(RECIPES / f"{name}.yaml"), *flags]))


def flat(value):
    return value if isinstance(value, list) else [value]


def train(run, method, *, rate, seed, arguments, output):
    """Run the recipe; returns the log of its trainer and the number of trainable parameters."""
    data = arguments.work / "data" / run.rows
    if not data.exists():
        smollm2_data.write_rows(data, rows_of(run.rows, arguments.data))
    settings = {"model": arguments.model, "dataset": data, "output_dir": output, "max_steps": run.steps, "seed": seed}
    settings |= {"per_device_train_batch_size": run.batch_size, "learning_rate": rate, "warmup_steps": run.steps // 10}
    settings |= COMMON | {"save_steps": run.steps, "eval_steps": run.steps} | METHODS[method] | run.settings
    if method != next(iter(METHODS)):
        settings["eval_on_start"] = False  # all start at the base model: once is enough
    if METHODS[method]["method"] in ("eigenlora", "random"):
        settings["subspace"] = arguments.work / "recycled" / "subspace"
    call_recipe(run.recipe, settings)
    state = json.loads((output / f"checkpoint-{run.steps}" / "trainer_state.json").read_text())
    return state["log_history"]


def curves(log):
    """Of the trainer's log, each metric worth keeping as [[step, value], ...]."""
    kept = ("loss", "eval_loss", "reward", "kl", "accuracy", "eval_accuracy", "mean_token_accuracy")
    kept += ("eval_mean_token_accuracy", "rewards/accuracies", "eval_rewards/accuracies", "completions/mean_length")
    found = {}
    for entry in log:
        for name in kept:
            if name in entry:
                found.setdefault(name, []).append([entry["step"], round(entry[name], 4)])
    return found


def build_zoo(arguments, record):
    for number, task in enumerate(ZOO):
        if record.find(run="zoo", task=task):
            continue
        start = time.process_time()
        run = Run("sft", task, ZOO_RUN.steps, ZOO_RUN.batch_size, ZOO_RUN.settings)
        log = train(
            run, "LoRA r16", rate=2e-3, seed=10 + number, arguments=arguments, output=arguments.work / "zoo" / task
        )
        record.add({"run": "zoo", "task": task, "seed": 10 + number, "learning_rate": 2e-3, **finish(start, log)})
    if not (arguments.work / "recycled" / "subspace").exists():
        adapters = [str(arguments.work / "zoo" / task) for task in ZOO]
        call_recipe(
            "build_subspace", {"adapters": adapters, "out": arguments.work / "recycled", "n_components": N_COMPONENTS}
        )


def finish(start, log):
    return {"cpu_seconds": round(time.process_time() - start, 1), "curves": curves(log)}


def rates(method):
    return LORA_RATES if METHODS[method]["method"] == "lora" else COEFFICIENT_RATES


def tune(arguments, record):
    run = Run("sft", TUNING_TASK, 16, 4, {"eval_on_start": False})
    for method in METHODS:
        for rate in rates(method):
            cell = {"run": "tune", "method": method, "learning_rate": rate, "seed": 100}
            if record.find(**cell):
                continue
            start = time.process_time()
            log = train(run, method, rate=rate, seed=100, arguments=arguments, output=arguments.work / "runs" / "tune")
            record.add({**cell, "task": TUNING_TASK, "steps": run.steps, "batch_size": 4, **finish(start, log)})
            print(f"tune {method} {rate:g}: {record.rows[-1]['curves']['eval_loss']}", flush=True)


def best_rate(record, method):
    rows = [row for row in record.rows if row["run"] == "tune" and row["method"] == method]
    if len(rows) < len(rates(method)):
        raise SystemExit(f"{method} is not tuned yet: --runs zoo tune")
    return min(rows, key=lambda row: row["curves"]["eval_loss"][-1][1])["learning_rate"]


def compare(name, method, arguments, record, seed=0):
    """Train one method by one trainer, unless it is in the record."""
    run = RUNS[name]
    if record.find(run=name, method=method, seed=seed):
        return
    start = time.process_time()
    rate = best_rate(record, method) * run.rate_factor
    output = arguments.work / "runs" / name / METHODS[method]["method"] / str(METHODS[method]["r"])
    log = train(run, method, rate=rate, seed=seed, arguments=arguments, output=output)
    row = {"run": name, "method": method, "seed": seed, "learning_rate": rate, "steps": run.steps}
    record.add({**row, "batch_size": run.batch_size, **finish(start, log)})
    found = record.rows[-1]
    print(name, method, f"{found['cpu_seconds']} s", {k: v[-1] for k, v in found["curves"].items()}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["zoo", "tune", *RUNS], choices=["zoo", "tune", *RUNS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    smollm2_data.quiet()
    record = smollm2_data.Record(arguments.results, environment())
    if "zoo" in arguments.runs:
        build_zoo(arguments, record)
    if "tune" in arguments.runs:
        tune(arguments, record)
    for method in arguments.methods:  # the outer loop: an early end leaves whole methods
        for name in RUNS:
            if name in arguments.runs:
                compare(name, method, arguments, record)


if __name__ == "__main__":
    main()
