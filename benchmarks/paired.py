"""Paired directions beside other bases, on the ten adapters of MiniLM that the demo ships: shares by K, and bytes of stores.

Command:  python benchmarks/paired.py
Hardware: CPU, one thread; about two minutes.
Writes:   benchmarks/results/paired.json and two tables on stdout.

Shares are of ‖ΔW‖², every adapter scaled to unit norm, means over the 12 modules. "full" counts K² numbers per adapter and module
(the core that the bases hold at most), "diagonal" K numbers. Stores hold the ten adapters by projection, written to disk: all
files, the cores alone, and the mean relative error that their members record.
"""

import json
import tempfile
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from timing import environment

import eigenpeft
from eigenpeft.building import build_subspace
from eigenpeft.demo import shipped_adapters
from eigenpeft.linalg.bases.fitting import explained_share_curve
from eigenpeft.linalg.bases.paired import pair_curve
from eigenpeft.linalg.bases.stacking import stack_factors

RESULTS = Path(__file__).parent / "results" / "paired.json"
COUNTS = (8, 16, 32)


def diagonal_share(collection, subspace):
    """What diagonal cores hold on the bases of a subspace, each coefficient by least squares."""
    shares = []
    for module in collection.modules:
        factors = [(each.lora_B, each.lora_A) for each in collection.factors(module)]
        stacks = stack_factors(factors, rows="moments", weighting="equal")
        bank = subspace[module]
        shares.append(float(pair_curve(stacks, bank.components_in, bank.components_out)[-1]))
    return sum(shares) / len(shares)


def full_share(collection, subspace):
    """What full cores hold on orthonormal bases."""
    shares = []
    for module in collection.modules:
        factors = [(each.lora_B, each.lora_A) for each in collection.factors(module)]
        bank = subspace[module]
        shares.append(
            float(
                explained_share_curve(factors, components_in=bank.components_in, components_out=bank.components_out)[-1]
            )
        )
    return sum(shares) / len(shares)


def store_row(collection, *, method, k):
    """Bytes on disk and errors of a store of all ten."""
    subspace = build_subspace(collection, n_components=k, method=method)
    store = eigenpeft.AdapterStore.from_collection(subspace, collection)
    with tempfile.TemporaryDirectory() as folder:
        store.save_pretrained(Path(folder) / "store")
        total = sum(file.stat().st_size for file in (Path(folder) / "store").rglob("*") if file.is_file())
        members = sum(file.stat().st_size for file in (Path(folder) / "store" / "members").rglob("*") if file.is_file())
        cores = sum(core.n_bytes for name in store.names for core in store[name].values())
        errors = [error for name in store.names for error in store[name].relative_errors.values()]
        kind = store[store.names[0]][collection.modules[0]].kind
    return {
        "method": method,
        "n_components": k,
        "core": kind,
        "bytes": total,
        "bytes_of_members": members,
        "bytes_of_cores": cores,
        "bytes_of_bases": subspace.n_bytes,
        "mean_squared_error": sum(error**2 for error in errors) / len(errors),
    }


def main():
    disable_progress_bars()
    collection = eigenpeft.AdapterCollection.from_pretrained(shipped_adapters())
    rows = []
    for k in COUNTS:
        built = {
            method: build_subspace(collection, n_components=k, method=method)
            for method in ("balanced", "hooi", "paired")
        }
        row = {
            "n_components": k,
            "paired": built["paired"].explained_share,
            "hooi_full": full_share(collection, built["hooi"]),
            "balanced_full": full_share(collection, built["balanced"]),
            "hooi_diagonal": diagonal_share(collection, built["hooi"]),
            "balanced_diagonal": diagonal_share(collection, built["balanced"]),
            "never_above_balanced_diagonal": all(
                built["paired"][module].explained_share
                >= diagonal_share_of(collection, built["balanced"], module) - 1e-6
                for module in collection.modules
            ),
        }
        rows.append(row)
        print(
            "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    target = next(row["paired"] for row in rows if row["n_components"] == 16)
    stores = [store_row(collection, method="paired", k=16), store_row(collection, method="hooi", k=16)]
    for k in (16, 24, 32, 40, 48, 56, 64, 72, 80):
        stores.append(store_row(collection, method="balanced", k=k))
        if 1 - stores[-1]["mean_squared_error"] >= target:
            break
    for row in stores:
        print(
            "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    found = {"environment": environment(), "shares": rows, "stores": stores}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def diagonal_share_of(collection, subspace, module):
    """`diagonal_share` of one module."""
    factors = [(each.lora_B, each.lora_A) for each in collection.factors(module)]
    stacks = stack_factors(factors, rows="moments", weighting="equal")
    return float(pair_curve(stacks, subspace[module].components_in, subspace[module].components_out)[-1])


if __name__ == "__main__":
    main()
