"""Compress a folder of adapters with vlora-dev or lorashare and write back what they reconstruct; run by peers.py.

Command:  PYTHON_OF_THE_PEERS benchmarks/peers_worker.py vlora|lorashare K OUT ADAPTER [ADAPTER ...]
Writes:   OUT/<name>/ for each adapter, as the peer itself saves it; one line of JSON on stdout: the bytes of the tensors it
          needs to rebuild all adapters, or its error, and its warnings. Imports nothing of eigenpeft.
"""

import json
import sys
import time
import warnings
from pathlib import Path


def vlora(k, out, adapters):
    """`SharedSubspace.from_adapters`, `reconstruct`, `save_adapter`."""
    from vlora import SharedSubspace, load_adapter, save_adapter

    names = [Path(adapter).name for adapter in adapters]
    subspace = SharedSubspace.from_adapters(
        [load_adapter(adapter) for adapter in adapters], task_ids=names, num_components=k
    )
    for name in names:
        save_adapter(subspace.reconstruct(name), out / name)
    sides = (subspace.components_a, subspace.components_b, subspace.means_a, subspace.means_b)
    loadings = [side for task in subspace.tasks.values() for side in (task.loadings_a, task.loadings_b)]
    return [tensor for tensors in (*sides, *loadings) for tensor in tensors.values()]


def lorashare(k, out, adapters):
    """`SHAREModel.from_adapters`, `reconstruct`."""
    from lorashare import SHAREModel

    share = SHAREModel.from_adapters(
        {Path(adapter).name: adapter for adapter in adapters}, num_components=k, device="cpu"
    )
    for adapter in adapters:
        share.reconstruct(Path(adapter).name, output_dir=str(out / Path(adapter).name))
    return [tensor for tensors in (share.components, *share.all_loadings.values()) for tensor in tensors.values()]


def main():
    peer, k, out, adapters = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    report = {"error": None, "bytes": None}
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tensors = {"vlora": vlora, "lorashare": lorashare}[peer](k, out, adapters)
            report["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        except Exception as error:  # whatever a peer raises is its answer
            report["error"] = f"{type(error).__name__}: {error}"
    report["cpu_seconds"] = time.process_time() - start
    report["warnings"] = sorted({str(warning.message) for warning in caught})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
