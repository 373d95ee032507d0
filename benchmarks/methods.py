"""Which way of fitting explains most of the adapters' updates? Four methods, two weightings, several K, any collection.

Command:  python benchmarks/methods.py --adapters DIR [DIR ...] --n-components 8 16 32
Hardware: CPU, one thread; seconds to a minute.
Writes:   benchmarks/results/methods.json and a table on stdout: explained share of Σ‖ΔW‖² (mean over the modules), measured
          in factored form with the weighting that the subspace was fitted with, and the seconds the fit took. The raw recipe
          of EigenLoRAx depends on how the factors of each adapter are scaled; `--regauge` re-factors every adapter by a random
          G of condition 30 (A -> G A, B -> B G⁻¹, the same ΔW) to show it.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

import eigenpeft
from eigenpeft.collection import AdapterCollection
from eigenpeft.linalg.bases.fitting import explained_share_curve, fit_bases

METHODS = ("balanced", "hosvd", "hooi", "eigenlorax")
RESULTS = Path(__file__).parent / "results" / "methods.json"


def regauged(pairs, generator):
    """The same updates in other factors: each (B, A) becomes (B G⁻¹, G A) with cond(G) = 30."""
    result = []
    for lora_B, lora_A in pairs:
        rank = len(lora_A)
        left, right = (
            torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0] for _ in "lr"
        )
        scales = torch.logspace(0, torch.log10(torch.tensor(30.0)).item(), rank, dtype=torch.float64)
        gauge, inverse = (left * scales) @ right, (right.mT / scales) @ left.mT
        result.append(((lora_B.double() @ inverse).float(), (gauge @ lora_A.double()).float()))
    return result


def measure(collection, *, method, weighting, n_components, regauge):
    """Mean explained share over the modules, and seconds."""
    shares, seconds = [], 0.0
    generator = torch.Generator().manual_seed(0)
    for module in collection.modules:
        pairs = [(factors.lora_B, factors.lora_A) for factors in collection.factors(module)]
        fitted_to = regauged(pairs, generator) if regauge else pairs
        start = time.perf_counter()
        bases = fit_bases(fitted_to, n_components=n_components, method=method, weighting=weighting)
        seconds += time.perf_counter() - start
        curve = explained_share_curve(
            pairs, components_in=bases.components_in, components_out=bases.components_out, weighting=weighting
        )
        shares.append(float(curve[-1]))
    return {"explained_share": sum(shares) / len(shares), "smallest": min(shares), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--n-components", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--name", default=None, help="what to call this collection in the record")
    parser.add_argument("--regauge", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = arguments.name or Path(arguments.adapters[0]).name
    rows = []
    with AdapterCollection.from_pretrained(arguments.adapters) as collection:
        print(f"{name}: {len(collection)} adapters, {len(collection.modules)} modules")
        for weighting in ("equal", "none"):
            for n_components in arguments.n_components:
                for method in METHODS:
                    row = {"weighting": weighting, "n_components": n_components, "method": method}
                    row |= measure(collection, regauge=arguments.regauge, **row)
                    rows.append(row)
                    print(
                        f"{weighting:8} K={n_components:<4} {method:11} {row['explained_share']:.4f} "
                        f"(smallest {row['smallest']:.4f}) {row['seconds']:.2f} s",
                        flush=True,
                    )
        record[f"{name}{' (re-gauged)' if arguments.regauge else ''}"] = {
            "adapters": list(collection.names),
            "rows": rows,
            "environment": {
                "eigenpeft": eigenpeft.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "threads": 1,
            },
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
