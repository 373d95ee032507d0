"""How much longer than one build does leaving out each of 100 adapters take?

Command:  python benchmarks/audit_scaling.py
Hardware: CPU, one thread; about two minutes.
Writes:   benchmarks/results/audit_scaling.json and a table on stdout: CPU seconds of one build (`fit_bases`, balanced, K = 32),
          of the held-out shares of all adapters at K = 1 to 32, and their ratio, each the median of interleaved repetitions
          on generated factors; and how far the shares are from explicit refits without the adapter, on a sample of adapters.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import eigenpeft
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.linalg.fitting import fit_bases
from eigenpeft.linalg.leave_one_out import held_out_curves
from eigenpeft.linalg.stacking import stack_factors

RESULTS = Path(__file__).parent / "results" / "audit_scaling.json"
N_COMPONENTS = 32
RANK = 8


def make_factors(n_adapters, width, noise, seed):
    """Adapters in 24 shared directions a side of falling importance, plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    strength = torch.linspace(1.0, 0.2, 24)
    inside, outside = (normal(24, width) / width**0.5 for _ in "io")
    return [
        (
            ((normal(RANK, 24) * strength) @ outside + noise * normal(RANK, width) / width**0.5).mT.contiguous(),
            (normal(RANK, 24) * strength) @ inside + noise * normal(RANK, width) / width**0.5,
        )
        for _ in range(n_adapters)
    ]


def seconds(work):
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def largest_error(factors, shares, sample):
    """Largest difference of a held-out share at K from that of a refit in float64 on the other adapters."""
    worst = 0.0
    for i in sample:
        rest = [(lora_B.double(), lora_A.double()) for j, (lora_B, lora_A) in enumerate(factors) if j != i]
        fitted = fit_bases(rest, n_components=N_COMPONENTS)
        error = projection_residual(*factors[i], fitted.components_out, fitted.components_in)
        truth = 1.0 - float(error / frobenius_norm(*factors[i])) ** 2
        worst = max(worst, abs(truth - float(shares.both[i, -1])))
    return worst


def measure(n_adapters, width, noise, *, modules, check):
    builds, audits, worst = [], [], 0.0
    for module in range(modules):
        factors = make_factors(n_adapters, width, noise, module)
        build, _ = seconds(lambda factors=factors: fit_bases(factors, n_components=N_COMPONENTS))
        audit, shares = seconds(
            lambda factors=factors: held_out_curves(
                stack_factors(factors, rows="balanced", weighting="equal"),
                n_components=N_COMPONENTS,
            )
        )
        builds.append(build)
        audits.append(audit)
        if module == 0:
            worst = largest_error(factors, shares, range(0, n_adapters, n_adapters // check))
    build, audit = statistics.median(builds), statistics.median(audits)
    return {
        "adapters": n_adapters,
        "rank": RANK,
        "width": width,
        "noise": noise,
        "modules": modules,
        "build_seconds": build,
        "held_out_seconds": audit,
        "ratio": audit / build,
        "largest_error": worst,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=8, help="modules of every row; times are medians over them")
    parser.add_argument("--check", type=int, default=4, help="adapters to refit explicitly")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(20, 256, 0.3, modules=1, check=1)  # the first call of LAPACK loads it
    rows = []
    for n_adapters, width, noise in ((25, 768, 0.3), (100, 768, 0.3), (100, 768, 3.0), (100, 2048, 0.3)):
        row = measure(n_adapters, width, noise, modules=arguments.modules, check=arguments.check)
        rows.append(row)
        print(
            f"{n_adapters:4} adapters, width {width:5}, noise {noise}: build {row['build_seconds']:.3f} s, held out "
            f"{row['held_out_seconds']:.3f} s, ratio {row['ratio']:.2f}, error {row['largest_error']:.1e}",
            flush=True,
        )
    environment = {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
