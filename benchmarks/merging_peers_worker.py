"""One merge by another package, in an environment that has it: vlora-dev on factors, mergekit and fusion_bench on full weights.

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
import yaml
from safetensors.torch import load_file, save_file


def main():
    tool, method, base, out, *adapters = sys.argv[1:]
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    run = {"vlora": vlora, "mergekit": mergekit, "fusion_bench": fusion_bench}[tool]
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


def mergekit(method, base, out, adapters):
    """Whole models in, a whole model out; `adapters` are folders of models with their adapter merged in."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    parameters = {"weight": 1 / len(adapters), "density": {"task_arithmetic": 1.0, "ties": 0.2}.get(method, 0.5)}
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": parameters} for model in adapters],
        "parameters": {"normalize": False},
        "dtype": "float32",
    }
    start = time.process_time()
    options = MergeOptions(copy_tokenizer=False, trust_remote_code=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config))), str(out / "model"), options)
    seconds = time.process_time() - start
    write_delta(
        base,
        out,
        {key: value for path in (out / "model").glob("*.safetensors") for key, value in load_file(path).items()},
    )
    return seconds


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
