"""One merge by another package, in an environment that has it: vlora-dev on factors, fusion_bench on full weights.

Command:  python benchmarks/merging_peers_worker.py TOOL METHOD BASE OUT ADAPTER ...    (called by merging_peers.py)

Prints one line of JSON: CPU seconds and peak bytes of the merge alone; what it made lies in OUT: an adapter's folder (vlora), or
the merged weights of the adapted modules less those of the base (`delta.safetensors`).
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main():
    tool, method, base, out, *adapters = sys.argv[1:]
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    run = {"vlora": vlora, "fusion_bench": fusion_bench}[tool]
    seconds = run(method, Path(base), Path(out), [Path(adapter) for adapter in adapters])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cpu_seconds": round(seconds, 2), "peak_bytes": peak}))


def vlora(method, base, out, adapters):
    from vlora.io import load_adapter, save_adapter
    from vlora.merge import dare_merge, task_arithmetic, ties_merge

    start = time.process_time()
    loaded = [load_adapter(adapter) for adapter in adapters]
    merge = {"task_arithmetic": task_arithmetic, "ties": ties_merge, "dare": dare_merge}[method]
    save_adapter(merge(loaded, weights=[1 / len(loaded)] * len(loaded)), out)
    return time.process_time() - start


def fusion_bench(method, base, out, adapters):
    """Its TIES on one long vector of the adapted weights of all models."""
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    start = time.process_time()
    before = weights_of(base)
    keys = sorted(before)
    vectors = torch.stack(
        [torch.cat([(weights_of(model)[key] - before[key]).flatten() for key in keys]) for model in adapters]
    )
    merged, place = ties_merging(vectors, reset_thresh=20, merge_func="mean"), 0
    seconds = time.process_time() - start
    found = {}
    for key in keys:
        size = before[key].numel()
        found[key] = before[key] + merged[place : place + size].view_as(before[key])
        place += size
    write_delta(base, out, found)
    return seconds


def weights_of(model):
    found = {key: value for path in model.glob("*.safetensors") for key, value in load_file(path).items()}
    return {key: value.float() for key, value in found.items() if key.endswith(("query.weight", "value.weight"))}


def write_delta(base, out, merged):
    before = weights_of(base)
    save_file(
        {key: (merged[key].float() - value).contiguous() for key, value in before.items()}, out / "delta.safetensors"
    )


if __name__ == "__main__":
    main()
