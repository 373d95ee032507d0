"""Seconds and memory of merging eight rank-16 adapters with Mistral-7B's q, k, v, o shapes, beside the same rules on full weights.

Command:  python benchmarks/merging_speed.py --work DIR               (about 2 minutes on an idle core)
          python benchmarks/merging_speed.py --work DIR --threads 2   (the same on two)
          python benchmarks/merging_speed.py --work DIR --full        (the rules on whole matrices: about 4 minutes on an idle core)
Writes:   benchmarks/results/merging_speed.json

Random factors, 128 modules, float32 on disk; from the adapters' folders to the merged folder, each rule in a process of its own:
wall and CPU seconds, and the peak of resident memory, Python and torch included. "eigenpeft" has one thread.

The rules on full weights run on the four modules of one layer, in float32 with the same arithmetic as the definitions, CPU seconds
on one thread, and are multiplied by 32 layers. Their time leaves out forming the updates B A and reading and writing; ours has
everything in it. The whole merge and the rule on full weights run one after the other, so that both see the same machine, and TIES,
which needs no decomposition on full weights and has the smallest ratio, three times in turns; "times_slower" is the median of the
rule alone over the median of ours. What is needed besides to have
an adapter of rank 16 is in "truncation": a randomized singular value decomposition of the merged matrix (torch.svd_lowrank, 24
directions, two passes), which is much cheaper than torch.linalg.svd; "times_slower_with_truncation" has it in. Iso-C has its
decomposition already, so that its truncation is free. TSV-M is measured on k and v; on q and o it has ten decompositions (eight
updates and two of the concatenated vectors) that each cost what the one of Iso-C does there.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from timing import environment

from eigenpeft import merge

SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
N_ADAPTERS, RANK, N_LAYERS, TURNS = 8, 16, 32, 3
METHODS = ("tsv", "iso_c", "ties", "task_arithmetic", "pico", "svc", "wudi")
RESULT = Path(__file__).parent / "results" / "merging_speed.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", nargs="*", help="rules on whole matrices: iso_c, ties, tsv; all without a name")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        one(arguments.work, arguments.one)
        return
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"eigenpeft": {}, "full": {}, "truncation": {}}
    adapters = make_adapters(arguments.work)
    if arguments.full is not None:
        results["truncation"] = truncation()
        print("truncation", results["truncation"], flush=True)
        for method in arguments.full or ("ties", "iso_c", "tsv"):
            turns = []
            for _ in range(TURNS if method == "ties" else 1):
                turns.append((full(method, results), in_a_process(adapters, method, threads=1)))
                print(method, turns[-1], flush=True)
            results["full"][method] = compared(method, turns, results["truncation"]["cpu_seconds_128_modules"])
            write(results)
        return
    own = results.setdefault("eigenpeft" if arguments.threads == 1 else f"eigenpeft, {arguments.threads} threads", {})
    for method in METHODS:
        own[method] = in_a_process(adapters, method, threads=arguments.threads)
        print(method, own[method], flush=True)
        write(results)


def write(results):
    results |= {"command": "python benchmarks/merging_speed.py", "environment": environment()}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def compared(method, turns, truncation):
    """What turns of (rule on full weights, whole merge) say together."""
    found = turns[len(turns) // 2][0] | {
        "turns": [[alone["cpu_seconds_128_modules"], ours["cpu_seconds"]] for alone, ours in turns]
    }
    alone, ours = (median(column) for column in zip(*found["turns"], strict=True))
    cut = 0.0 if method == "iso_c" else truncation
    return found | {
        "cpu_seconds_128_modules": alone,
        "times_slower": round(alone / ours, 1),
        "times_slower_with_truncation": round((alone + cut) / ours, 1),
    }


def in_a_process(adapters, method, *, threads):
    """One merge in a process of its own."""
    command = [sys.executable, __file__, "--work", adapters, "--threads", threads, "--one", method]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(adapters, method):
    """One merge in this process; prints what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    merged = merge(adapters, rule=method, rank=16, progress=False)
    merged.save_pretrained(adapters.parent / f"merged-{method}", overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "peak_bytes": peak,
                "modules": merged.report.n_modules,
            }
        )
    )


def make_adapters(work):
    """Eight folders with random factors of unit-size entries, written once."""
    folder = work / "mistral_shapes"
    generator = torch.Generator().manual_seed(0)
    for i in range(N_ADAPTERS):
        place = folder / f"adapter{i}"
        if (place / "adapter_config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer in range(N_LAYERS):
            for name, (m, n) in SHAPES.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
                tensors[f"{key}A.weight"] = torch.randn(RANK, n, generator=generator) / n**0.5
                tensors[f"{key}B.weight"] = torch.randn(m, RANK, generator=generator) / RANK**0.5
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "base_model_name_or_path": "mistral",
            "task_type": None,
        }
        (place / "adapter_config.json").write_text(
            json.dumps(config | {"init_lora_weights": True, "target_modules": list(SHAPES)})
        )
    return folder


def full(method, results):
    """CPU seconds of a rule on whole matrices of one layer, and what that makes for 32 layers."""
    measured = [name for name, shape in SHAPES.items() if not (method == "tsv" and min(shape) == 4096)]
    found = by_shape(FULL[method], N_ADAPTERS, measured)
    if method == "tsv":
        known = results["full"]["iso_c"]["cpu_seconds"]
        found |= {name: round(10 * known[name], 1) for name in SHAPES if name not in measured}
    total = round(N_LAYERS * sum(found.values()), 1)
    extrapolated = [name for name in SHAPES if name not in measured]
    return {"cpu_seconds": found, "extrapolated": extrapolated, "cpu_seconds_128_modules": total}


def truncation():
    """CPU seconds of cutting whole merged matrices of one layer to rank 16, and what that makes for 32 layers."""
    found = by_shape(lambda updates: torch.svd_lowrank(updates[0], q=RANK + 8, niter=2), 1, SHAPES)
    return {"cpu_seconds": found, "cpu_seconds_128_modules": round(N_LAYERS * sum(found.values()), 1)}


def by_shape(function, n_updates, names):
    """CPU seconds of a function of whole updates, for each module; modules of one shape are measured once."""
    generator, by_shape, seconds = torch.Generator().manual_seed(0), {}, {}
    for name in names:
        m, n = SHAPES[name]
        if (m, n) not in by_shape:
            updates = [
                torch.randn(m, RANK, generator=generator) @ torch.randn(RANK, n, generator=generator)
                for _ in range(n_updates)
            ]
            start = time.process_time()
            function(updates)
            by_shape[m, n] = round(time.process_time() - start, 2)
        seconds[name] = by_shape[m, n]
        print(name, seconds[name], flush=True)
    return seconds


def ties_full(updates, density=0.2):
    trimmed = []
    for update in updates:
        kept = int(density * update.numel())
        threshold = update.abs().flatten().kthvalue(update.numel() - kept).values
        trimmed.append(torch.where(update.abs() > threshold, update, 0.0))
    sign = sum(trimmed).sign()
    agreeing = [torch.where(update * sign > 0, update, 0.0) for update in trimmed]
    return sum(agreeing) / sum((update != 0).float() for update in agreeing).clamp(min=1)


def iso_c_full(updates):
    u, s, vh = torch.linalg.svd(sum(updates), full_matrices=False)
    return s.mean() * (u @ vh)


def tsv_full(updates):
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    most = len(parts[0][1]) // len(updates)
    left, right = torch.cat([u[:, :most] for u, _, _ in parts], 1), torch.cat([vh[:most] for _, _, vh in parts])
    values = torch.cat([s[:most] for _, s, _ in parts])
    polar = []
    for matrix in (left, right):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        polar.append(u @ vh)
    return (polar[0] * values) @ polar[1]


FULL = {"ties": ties_full, "iso_c": iso_c_full, "tsv": tsv_full}


if __name__ == "__main__":
    main()
