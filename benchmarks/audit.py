"""How much longer than one build does leaving out each of 100 adapters take?

Command:  python benchmarks/audit.py            (--quick: 8 modules)
Hardware: CPU, one thread; about four minutes, 320 MB of disk for the generated adapters.
Writes:   benchmarks/results/audit.json and a table on stdout: CPU seconds of one build (`SubspaceBuilder`, balanced, K = 32) of
          100 adapters of rank 8 on 64 modules of width 768, of reading the same files and leaving out each adapter in turn
          (`held_out_curves`, K = 1 to 32), and their ratio, medians of rounds in turns; and how far the shares are from refits
          without the adapter, in float64, on a sample of adapters.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import save_file
from timing import environment

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.linalg.bases.fitting import fit_bases
from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.linalg.scores.leave_one_out import held_out_curves

RESULTS = Path(__file__).parent / "results" / "audit.json"
N_COMPONENTS, N_SHARED, RANK, WIDTH, N_ADAPTERS, N_MODULES = 32, 24, 8, 768, 100, 64
CHECKED = (0, 33, 66, 99)


def write_adapters(folder, *, n_modules, noise):
    """Adapters in 24 shared directions per side of falling importance, plus noise."""
    strength = torch.linspace(1.0, 0.2, N_SHARED)
    shared = {}
    for i in range(n_modules):
        generator = torch.Generator().manual_seed(i)
        shared[i] = [torch.randn(N_SHARED, WIDTH, generator=generator) / WIDTH**0.5 for _ in ("in", "out")]
    names = [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(n_modules)]
    for adapter in range(N_ADAPTERS):
        generator = torch.Generator().manual_seed(1000 + adapter)
        tensors = {}
        for i, name in enumerate(names):
            inside, outside = (
                (torch.randn(RANK, N_SHARED, generator=generator) * strength) @ basis
                + noise * torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
                for basis in shared[i]
            )
            tensors[f"base_model.model.{name}.lora_A.weight"] = inside
            tensors[f"base_model.model.{name}.lora_B.weight"] = outside.mT.contiguous()
        place = folder / f"a{adapter:03}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "generated"}))


def leave_out_each(collection):
    return {
        module: held_out_curves(
            stack_factors(
                [(each.lora_B, each.lora_A) for each in collection.factors(module)], rows="balanced", weighting="equal"
            ),
            n_components=N_COMPONENTS,
        )
        for module in collection.modules
    }


def largest_error(collection, shares):
    """Largest difference at K = 32 from a refit in float64 on the other adapters, on the first module."""
    module, worst = collection.modules[0], 0.0
    factors = [(each.lora_B.double(), each.lora_A.double()) for each in collection.factors(module)]
    for i in CHECKED:
        fitted = fit_bases(factors[:i] + factors[i + 1 :], n_components=N_COMPONENTS)
        error = projection_residual(
            *factors[i], components_out=fitted.components_out, components_in=fitted.components_in
        )
        truth = 1.0 - float(error / frobenius_norm(*factors[i])) ** 2
        worst = max(worst, abs(truth - float(shares[module].both[i, -1])))
    return worst


def seconds(work):
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(*, noise, n_modules, rounds):
    with tempfile.TemporaryDirectory() as scratch:
        write_adapters(Path(scratch), n_modules=n_modules, noise=noise)
        collection = AdapterCollection.from_pretrained(scratch)
        builds, audits, shares = [], [], {}
        for turn in range(rounds + 1):
            build, _ = seconds(lambda: SubspaceBuilder(N_COMPONENTS).fit(collection))
            audit, shares = seconds(lambda: leave_out_each(collection))
            if turn:  # the first loads LAPACK and the files
                builds.append(build)
                audits.append(audit)
        worst = largest_error(collection, shares)
        collection.close()
    ratios = sorted(audit / build for audit, build in zip(audits, builds, strict=True))
    return {
        "adapters": N_ADAPTERS,
        "modules": n_modules,
        "rank": RANK,
        "width": WIDTH,
        "noise": noise,
        "rounds": rounds,
        "build_seconds": statistics.median(builds),
        "held_out_seconds": statistics.median(audits),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_error": worst,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 modules instead of 64; writes nothing")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    rows = []
    for noise in (0.3, 3.0):
        row = measure(noise=noise, n_modules=8 if arguments.quick else N_MODULES, rounds=arguments.rounds)
        rows.append(row)
        print(
            f"noise {noise}: build {row['build_seconds']:.2f} s, each left out {row['held_out_seconds']:.2f} s, ratio "
            f"{row['ratio']:.2f}, error {row['largest_error']:.1e}",
            flush=True,
        )
    if not arguments.quick:
        RESULTS.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
