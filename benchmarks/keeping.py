"""What it costs to keep adapters: size and error of stores of the ten adapters of MiniLM that the demo ships, by share and by K.

Command:  python benchmarks/keeping.py
Hardware: CPU, one thread; about two minutes.
Writes:   benchmarks/results/keeping.json and the table of docs/audit.md on stdout.

Each row is a subspace fitted to all ten adapters (rank 8 in 12 modules, a head each) and a store of them by projection. Sizes are
of bases and members with their heads and records, as `eigenpeft store list` says them, beside the files of the LoRAs. The error
is ‖ΔW - its projection‖ / ‖ΔW‖, mean and largest over adapters and modules; "kept" is the share of ‖ΔW‖², mean over both.
"""

import json
from pathlib import Path
from statistics import fmean

from huggingface_hub.utils import disable_progress_bars
from timing import environment

import eigenpeft
from eigenpeft.building import build_subspace
from eigenpeft.demo import shipped_adapters
from eigenpeft.report.summaries import store_sizes

RESULTS = Path(__file__).parent / "results" / "keeping.json"
WAYS = (
    *(("balanced", share) for share in (0.9, 0.95, 0.99, 0.999)),
    *(("balanced", k) for k in (16, 24, 32)),
    *(("paired", k) for k in (16, 24, 32)),
)


def row(collection, *, method, n_components):
    """One way to keep the adapters."""
    subspace = build_subspace(collection, n_components=n_components, method=method)
    store = eigenpeft.AdapterStore.from_collection(subspace, collection)
    errors = [error for name in store.names for error in store[name].relative_errors.values()]
    counts = [bank.n_components for bank in subspace.values()]
    return {
        "method": method,
        "n_components": n_components,
        "components": [min(counts), max(counts)],
        **store_sizes(store),
        "kept": fmean(1 - error**2 for error in errors),
        "mean_error": fmean(errors),
        "largest_error": max(errors),
    }


def main():
    """Measure every way, write them and print the table."""
    disable_progress_bars()
    with eigenpeft.AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        rows = [row(collection, method=method, n_components=n) for method, n in WAYS]
    record = {"environment": environment(), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("| build with | K | LoRAs, kB | store, kB | of the LoRAs | ‖ΔW‖² kept | error, mean (largest) |")
    print("|---|---|---|---|---|---|---|")
    for each in rows:
        low, high = each["components"]
        method = "" if each["method"] == "balanced" else f"--method {each['method']} "
        print(
            f"| `{method}-k {each['n_components']}` | {low if low == high else f'{low} to {high}'} "
            f"| {each['original_bytes'] / 1000:,.0f} | {each['bytes'] / 1000:,.0f} | {each['ratio']:.0%} | {each['kept']:.1%} "
            f"| {each['mean_error']:.1%} ({each['largest_error']:.1%}) |"
        )


if __name__ == "__main__":
    main()
