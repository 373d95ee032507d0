"""A weighted sum of adapters of a language model, by `merge`, by PEFT and by mergekit on full weights: error, seconds, memory.

Command:  python benchmarks/merging_full_weights.py --model FOLDER --work DIR --mergekit .mergekit/bin/mergekit-yaml
          (python -m venv .mergekit && .mergekit/bin/pip install torch==2.13.0 mergekit; `make smollm2` writes the model)
Hardware: CPU, one thread, 3 GB of disk; about 5 minutes.
Writes:   benchmarks/results/merging_full_weights.json

Three adapters of SmolLM2-135M's q and v with random factors that agree on nothing: ranks 4, 8 and 16, alphas 8, 16 and 16, the
last one rsLoRA. Weights .5, .3 and .2. The error is that of the merged update against the exact weighted sum in float64, over all
adapted modules. Each tool runs in a process of its own: CPU seconds of the whole process, start and files included, and its peak
of resident memory. mergekit takes whole models: base plus adapter, written first, which is not counted. TIES and DARE claim no
sum: their rows say how far from it they go.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from timing import environment
from transformers import AutoModelForCausalLM

from eigenpeft import merge

RESULT = Path(__file__).parent / "results" / "merging_full_weights.json"
# Runs a command and prints its usage. A process of its own, and a small one: the peak of a child counts what its parent held
# when it was forked.
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""
ADAPTERS = {"a": (4, 8, False, 0.5), "b": (8, 16, False, 0.3), "c": (16, 16, True, 0.2)}  # rank, alpha, rsLoRA, weight
TARGETS = ["q_proj", "v_proj"]
MERGEKIT = {"linear": {}, "task_arithmetic": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5}}
PEFT_TYPES = {"cat": {}, "svd": {"svd_rank": 28}, "linear": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mergekit", help="the command mergekit-yaml")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        one(*arguments.one, arguments.model, arguments.work)
        return
    exact = make_adapters(arguments.model, arguments.work)
    rows = {}
    for tool, methods in (("eigenpeft", ("task_arithmetic", "ties", "dare_ties", "tsv")), ("PEFT", PEFT_TYPES)):
        for method in methods:
            command = [
                sys.executable,
                __file__,
                "--model",
                arguments.model,
                "--work",
                arguments.work,
                "--one",
                tool,
                method,
            ]
            rows[f"{tool} {method}"] = measured(command, lambda: updates_of(arguments.work / "made"), exact)
            print(tool, method, rows[f"{tool} {method}"], flush=True)
    for method, options in MERGEKIT.items() if arguments.mergekit else ():
        recipe, out = arguments.work / f"{method}.yml", arguments.work / f"mergekit-{method}"
        models = [
            {"model": str(arguments.work / f"whole-{name}"), "parameters": {"weight": weight, **options}}
            for name, (*_, weight) in ADAPTERS.items()
        ]
        base = {} if method == "linear" else {"base_model": str(arguments.model)}
        # `normalize` divides by the sum of the weights where signs agree; the weights' sum is one as they stand.
        recipe.write_text(
            json.dumps(
                {
                    "merge_method": method,
                    "models": models,
                    "dtype": "float32",
                    "parameters": {"normalize": False},
                    **base,
                }
            )
        )
        command = [arguments.mergekit, recipe, out, "--no-copy-tokenizer"]
        rows[f"mergekit {method}"] = measured(command, lambda out=out: differences(out, arguments.model, exact), exact)
        print("mergekit", method, rows[f"mergekit {method}"], flush=True)
    results = {"command": "python benchmarks/merging_full_weights.py", "environment": environment(), "rows": rows}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def make_adapters(model, work):
    """Adapters and whole models on disk; the exact weighted sum of the updates by module."""
    torch.manual_seed(0)
    exact = {}
    for name, (rank, alpha, rslora, weight) in ADAPTERS.items():
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=TARGETS,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        scaling = alpha / rank**0.5 if rslora else alpha / rank
        for path, layer in adapted.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                B.data.mul_(0.05)
                exact[path] = exact.get(path, 0) + weight * scaling * (B.detach().double() @ A.detach().double())
        adapted.save_pretrained(work / "adapters" / name)
        if not (work / f"whole-{name}" / "config.json").exists():
            adapted.merge_and_unload().save_pretrained(work / f"whole-{name}")
    return exact


def one(tool, method, model, work):
    """One merge in this process; what it made lies in `made` as a plain LoRA's updates."""
    folders, weights = [work / "adapters" / name for name in ADAPTERS], [weight for *_, weight in ADAPTERS.values()]
    if tool == "eigenpeft":
        merged = merge(folders, rule=method, weights=weights, progress=False)
        merged.save_pretrained(work / "made", overwrite=True)
        return
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folders[0], adapter_name="a"
    )
    for folder in folders[1:]:
        adapted.load_adapter(str(folder), adapter_name=folder.name)
    adapted.add_weighted_adapter(list(ADAPTERS), weights, "made", combination_type=method, **PEFT_TYPES[method])
    adapted.save_pretrained(work, selected_adapters=["made"])


def measured(command, read, exact):
    """Error, CPU seconds and peak memory of a command in a process of its own, or its last words."""
    measuring = [sys.executable, "-S", "-c", MEASURE, *(str(part) for part in command)]
    done = subprocess.run(measuring, capture_output=True, text=True, check=True)
    status, seconds, peak = json.loads(done.stdout)
    if status:
        return {"error": None, "message": done.stderr.strip().splitlines()[-1][:200]}
    found = read()
    off = sum(float((found[name] - update).norm()) ** 2 for name, update in exact.items())
    error = (off / sum(float(update.norm()) ** 2 for update in exact.values())) ** 0.5
    return {"error": error, "cpu_seconds": round(seconds, 1), "peak_bytes": peak}


def updates_of(folder):
    merged = merge(folder, progress=False)
    return {name: B.double() @ A.double() for name, (B, A) in merged.factors.items()}


def differences(folder, base, exact):
    """What a merged model's weights are ahead of the base's, by module."""
    before, after = tensors(base, exact), tensors(folder, exact)
    return {name: after[name] - before[name] for name in exact}


def tensors(folder, names):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {
                name: file.get_tensor(f"{name}.weight").double()
                for name in names
                if f"{name}.weight" in file.keys()  # noqa: SIM118
            }
    return found


if __name__ == "__main__":
    main()
