"""What does one bank for all layers of a kind cost? Explained share and bytes beside a bank for each module, by K.

Command:  python benchmarks/shared_banks.py
Hardware: CPU, one thread; under a minute.
Writes:   benchmarks/results/shared_banks.json and a table on stdout, for the ten adapters of MiniLM that the demo ships.
"""

import json
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from timing import environment

import eigenpeft
from eigenpeft.building import build_shared_subspace
from eigenpeft.demo import shipped_adapters

RESULTS = Path(__file__).parent / "results" / "shared_banks.json"
OWN, SHARED = (8, 16, 32, 64), (8, 16, 32, 64, 128, 192)


def main():
    disable_progress_bars()
    collection = eigenpeft.AdapterCollection.from_pretrained(shipped_adapters())
    rows = []
    for method in ("balanced", "hooi"):
        for kind, build, counts in (
            ("own", eigenpeft.build_subspace, OWN),
            ("shared", build_shared_subspace, SHARED),
        ):
            for k in counts:
                subspace = build(collection, n_components=k, method=method)
                row = {"method": method, "banks": kind, "n_banks": len(subspace.banks), "n_components": k}
                rows.append(row | {"explained_share": subspace.explained_share, "bytes": subspace.n_bytes})
                print(f"{method:9} {kind:7} K {k:4} {subspace.explained_share:.3f} {subspace.n_bytes / 1e6:.2f} MB")
    RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
