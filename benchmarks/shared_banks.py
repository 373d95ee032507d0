"""What does one bank for all layers of a kind cost? Explained and held-out share and bytes beside a bank for each module.

Command:  python benchmarks/shared_banks.py [--zoo NAME=FOLDER ...]
Hardware: CPU, one thread; a minute or two a zoo.
Writes:   benchmarks/results/shared_banks.json and a table on stdout, for the ten adapters of MiniLM that the demo ships and for
          every zoo that is named.

"explained" is the share of the adapters' squared update norms that bases fitted to all of them hold. "held out" is the mean share
of an adapter that bases fitted to the others hold, at most `--folds` of them left out in turn. "random" is what a random
pair of subspaces of that size holds on average, K² / (m n). Shares are means over modules, each adapter counting equally.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from huggingface_hub.utils import disable_progress_bars
from timing import environment

import eigenpeft
from eigenpeft.building import build_shared_subspace, build_subspace
from eigenpeft.demo import shipped_adapters
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.stores.adapter_files import projected

RESULTS = Path(__file__).parent / "results" / "shared_banks.json"
BUILDERS = {"own": build_subspace, "shared": build_shared_subspace}
COUNTS = {"own": (8, 16, 32, 64), "shared": (8, 16, 32, 64, 128, 192)}


def held_out(collection, names, build, **options):
    """Mean share of adapters that the others' bases hold."""
    shares = []
    for name in names:
        subspace = build(collection.without(name), **options)
        errors = projected(collection, name, subspace, in_part=True).relative_errors
        shares.append(fmean(1 - error**2 for error in errors.values()))
    return fmean(shares)


def measure(zoo, collection, *, method, folds):
    """Rows of one zoo and method."""
    rows, names = [], collection.names[:: max(1, len(collection) // folds)][:folds]
    for kind, build in BUILDERS.items():
        for k in COUNTS[kind]:
            options = {"n_components": k, "method": method}
            try:
                subspace = build(collection, **options)
                outside = held_out(collection, names, build, **options)
            except SubspaceError as error:  # a module has fewer directions
                print(f"{zoo} {method} {kind} K {k}: {str(error).splitlines()[0][:100]}")
                continue
            random = fmean(k * k / (bank.in_features * bank.out_features) for bank in subspace.values())
            row = {"zoo": zoo, "method": method, "banks": kind, "n_banks": len(subspace.banks), "n_components": k}
            row |= {"n_modules": len(subspace), "explained_share": subspace.explained_share, "held_out_share": outside}
            row |= {"random_share": random, "n_left_out": len(names), "bytes": subspace.n_bytes}
            rows.append(row)
            print(
                f"{zoo:10} {method:9} {kind:7} {len(subspace.banks):3} banks K {k:4} explained {subspace.explained_share:.3f} "
                f"held out {outside:.3f} random {random:.4f} {subspace.n_bytes / 1e6:8.2f} MB",
                flush=True,
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", nargs="*", default=[], help="NAME=FOLDER of adapters of one base model.")
    parser.add_argument("--methods", nargs="*", default=["balanced", "hooi"])
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args()
    disable_progress_bars()
    zoos = {"shipped": str(shipped_adapters())} | dict(each.split("=", 1) for each in arguments.zoo)
    rows = []
    for zoo, folder in zoos.items():
        with eigenpeft.AdapterCollection.from_pretrained(folder) as collection:
            for method in arguments.methods:
                rows += measure(zoo, collection, method=method, folds=arguments.folds)
    RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
