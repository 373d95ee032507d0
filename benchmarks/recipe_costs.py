"""What a short run of each TRL recipe costs on SmolLM2-135M: CPU seconds and the peak of resident memory, each in its own process.

Command:   python benchmarks/recipe_costs.py --model smollm2/model --data DIR --work DIR   (see smollm2_data.py)
Hardware:  CPU, one thread, float32; about eight minutes of CPU time.
Writes:    benchmarks/results/recipe_costs.json (a row per recipe) and the same on stdout; started again, it goes on.

The subspace is random (K 16): what is trained, and so the cost, is the same as in a recycled one. `distill_lora` projects the
LoRA that `sft --method lora` has just trained onto it. Loading of Python, model and data is part of both figures. What a run
prints of its first and last loss, or of the divergences, is kept. `classification` is another model and a real comparison:
MiniLM, the part of banking77 that ships with eigenpeft, a subspace (K 8) of its ten shipped adapters, four methods, one seed.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import smollm2_data
import torch
from timing import environment

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.demo import assets
from eigenpeft.subspace import random_subspace

RECIPES = Path(__file__).parents[1] / "recipes"
RESULTS = Path(__file__).parent / "results" / "recipe_costs.json"
N_COMPONENTS = 16
COMMON = smollm2_data.ON_CPU | {"model_init_kwargs": '{"dtype": "float32"}', "bf16": False, "save_strategy": "no"}


@dataclass(frozen=True)
class Run:
    """A recipe, its rows, steps of so many rows, and the settings that differ from COMMON."""

    recipe: str
    rows: str
    steps: int
    batch_size: int
    settings: dict = field(default_factory=dict)


CLASSIFICATION = "classification"
METHODS = ["head", "random", "eigenlora", "same_parameters"]
RUNS = {
    "sft, LoRA": Run("sft", "qasc", 16, 4, {"method": "lora", "learning_rate": 2e-3}),
    "sft": Run("sft", "qasc", 16, 4, {"learning_rate": 1e-2}),
    "dpo": Run("dpo", "helpful", 12, 4, {"learning_rate": 3e-3}),
    "kto": Run("kto", "marked", 12, 4, {"learning_rate": 3e-3}),
    "reward": Run("reward", "helpful", 16, 4, {"learning_rate": 1e-2}),
    "grpo": Run(
        "grpo",
        "arithmetic",
        16,
        16,
        {"learning_rate": 3e-3, "dataset_config": "default", "num_generations": 8, "max_completion_length": 8},
    ),
    "distill_lora": Run("distill_lora", "qasc", 12, 4, {"max_completion_length": 16, "n_measured": 16}),
}


def rows_of(name, data):
    """Train and test rows; "marked" are the pairs one by one, each answer with what the user said of it."""
    if name == "qasc":
        return smollm2_data.t0(data, "qasc", n_test=32)
    if name == "arithmetic":
        return smollm2_data.arithmetic()
    pairs = smollm2_data.pairs(data, user="helpful", longest=240, n_test=32)
    if name == "helpful":
        return pairs
    return {
        split: [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        for split, rows in pairs.items()
    }


def subspace(lora, folder):
    """Random bases of the sizes that the trained LoRA gives."""
    if not folder.exists():
        with AdapterCollection.from_pretrained([lora]) as adapters:
            like = SubspaceBuilder(N_COMPONENTS).fit(adapters).subspace_
        random_subspace(like=like, seed=0).save_pretrained(folder)
    return folder


def classified(given):
    """The recipe for classifiers on what ships with eigenpeft."""
    rows, folder = given.work / "data" / CLASSIFICATION, given.work / "shipped-subspace"
    if not rows.exists():
        smollm2_data.write_rows(rows, {split: assets.banking77(split) for split in ("train", "test")})
    if not folder.exists():
        with AdapterCollection.from_pretrained(assets.shipped_adapters()) as adapters:
            SubspaceBuilder(8).fit(adapters).subspace_.save_pretrained(folder)
    settings = {
        "model": assets.base_model(),
        "dataset": rows,
        "subspace": folder,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings |= {"output_dir": given.work / CLASSIFICATION, "bf16": False}
    found = run_recipe(
        CLASSIFICATION, settings, given.work / "classification.log", "--seeds", "0", "--methods", *METHODS
    )
    printed = [line for line in found.pop("text").splitlines() if line.startswith(("majority", *METHODS))]
    return {"run": CLASSIFICATION, "steps": 150, "batch_size": 32, **found, "printed": printed}


def run_recipe(name, settings, log, *more):
    """A recipe in a process of its own: CPU seconds, peak memory, what it printed."""
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    command = [sys.executable, RECIPES / f"{name}.py", "--config", RECIPES / f"{name}.yaml", *flags, *more]
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text()
    if status:
        raise SystemExit(f"{name} ended with {status}: {text[-2000:]}")
    seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    return {"cpu_seconds": round(seconds, 1), "peak_gb": round(peak, 2), "text": text}


def measured(name, given):
    """Run one recipe with one adapter; its CPU seconds, peak memory, and the figures it prints."""
    run, output = RUNS[name], given.work / name.replace(", ", "-")
    data = given.work / "data" / run.rows
    if not data.exists():
        smollm2_data.write_rows(data, rows_of(run.rows, given.data))
    settings = {"model": given.model, "dataset": data, "output_dir": output, "max_steps": run.steps}
    settings |= {"per_device_train_batch_size": run.batch_size} | COMMON | run.settings
    if run.settings.get("method") != "lora":
        settings["subspace"] = subspace(given.work / "sft-LoRA", given.work / "subspace")
    if run.recipe == "distill_lora":
        settings["lora"] = given.work / "sft-LoRA"
    found = run_recipe(run.recipe, settings, given.work / f"{name}.log")
    text = found.pop("text")
    printed = [line for line in text.splitlines() if line.startswith(("divergence", "{'loss'", "{'train_runtime'"))]
    return {
        "run": name,
        "steps": run.steps,
        "batch_size": run.batch_size,
        **found,
        "printed": [printed[0], printed[-1]] if run.recipe != "distill_lora" and printed else printed,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=[*RUNS, CLASSIFICATION], choices=[*RUNS, CLASSIFICATION])
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = smollm2_data.Record(RESULTS, environment())
    for name in given.runs:
        if not record.find(run=name):
            record.add(classified(given) if name == CLASSIFICATION else measured(name, given))
            print(record.rows[-1], flush=True)


if __name__ == "__main__":
    main()
