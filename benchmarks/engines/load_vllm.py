"""What vLLM's loader does with the members of a store: the part of a first request that the plugin changes, without a server.

Command:  .vllm/bin/python benchmarks/engines/load_vllm.py      (the environment of `make vllm`)
Hardware: a CPU, one thread, 2 GB of memory; about 3 minutes on an idle core.
Writes:   benchmarks/results/vllm_loading.json. Fails if a member does not load, or the cache exceeds its bound.

A store of 200 members with random numbers in SmolLM2-135M's shapes: rank 8 in bases of 12 components, all linear layers. The cache
holds 20 of them.

all_members  Every member by name through `AdapterResolver.resolve` and `present`, as the plugin's hooks call them, then vLLM's
             `LoRAModel.from_local_checkpoint`; what it loaded is compared with the store's own factors.
first        CPU milliseconds of resolving and loading a member that is not cached, beside loading the same LoRA from a folder
             that was there, in turns. A request's own computation, which is the same for both, is left out: with it the ratio
             is nearer to 1 (`make vllm` measures that over HTTP).
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

from eigenpeft import AdapterStore, PrincipalSubspace, export_lora
from eigenpeft.engines.catalog import StoreCatalog
from eigenpeft.engines.lora_cache import LoraCache
from eigenpeft.engines.resolver import AdapterResolver
from eigenpeft.subspace import AdapterMember, Core, ModuleSubspace

RESULTS = Path(__file__).parents[1] / "results" / "vllm_loading.json"
BASE, N_LAYERS, N_MEMBERS, RANK, K, N_CACHED, N_TIMED = "smollm2", 30, 200, 8, 12, 20, 24
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def make_store(folder: Path) -> AdapterStore:
    torch.manual_seed(0)
    spectrum = torch.ones(K)
    banks = {}
    for layer in range(N_LAYERS):
        for name, (n_out, n_in) in SHAPES.items():
            inner, outer = (torch.linalg.qr(torch.randn(size, K))[0].mT.contiguous() for size in (n_in, n_out))
            banks[f"model.layers.{layer}.{name}"] = ModuleSubspace(
                inner,
                outer,
                singular_values_in=spectrum,
                singular_values_out=spectrum,
                explained_variance_ratio=spectrum / K,
            )
    members = {
        f"customer-{i:03d}": AdapterMember(
            {
                module: Core(
                    "low_rank", {"coefficients_in": torch.randn(RANK, K), "coefficients_out": torch.randn(K, RANK)}
                )
                for module in banks
            },
            record={"base_model": BASE, "task_type": "CAUSAL_LM"},
        )
        for i in range(N_MEMBERS)
    }
    AdapterStore(PrincipalSubspace(banks), members=members).save_pretrained(folder)
    return AdapterStore.from_pretrained(folder)


def loaded(folder: Path) -> LoRAModel:
    """As vLLM's worker loads an adapter for a CPU in float32."""
    helper = PEFTHelper.from_local_dir(str(folder), 2048)
    modules = {name.rsplit(".", 1)[1] for name in SHAPES}
    return LoRAModel.from_local_checkpoint(
        str(folder), modules, peft_helper=helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


def by_plugin(resolver: AdapterResolver, name: str) -> LoRAModel:
    folder = resolver.resolve(name, base_model=BASE)
    with resolver.present(name, folder=folder):
        return loaded(folder)


def difference(adapter: LoRAModel, store: AdapterStore, name: str) -> float:
    """Largest difference of the factors' products on some inputs, relative to the products."""
    largest = 0.0
    for module in ("model.layers.0.self_attn.q_proj", f"model.layers.{N_LAYERS - 1}.mlp.down_proj"):
        ours = store.factors(name, module=module)
        assert ours is not None
        theirs = adapter.loras[module]
        inputs = torch.eye(ours[1].shape[1], 16)
        expected, got = ours[0] @ (ours[1] @ inputs), theirs.lora_b @ (theirs.lora_a @ inputs) * theirs.scaling
        largest = max(largest, float((expected - got).norm() / expected.norm()))
    return largest


def clocked(call) -> float:
    started = time.process_time()
    call()
    return (time.process_time() - started) * 1e3


def first_loads(resolver: AdapterResolver, store: AdapterStore, names: list[str], work: Path) -> dict:
    milliseconds = {"plugin": [], "folder": [], "resolve": []}
    for i, name in enumerate(names):
        folder = work / "folders" / name
        export_lora(store, folder, adapter_name=name)
        for way in ("plugin", "folder") if i % 2 else ("folder", "plugin"):
            if way == "folder":
                milliseconds[way].append(clocked(lambda: loaded(folder)))  # noqa: B023
            else:
                resolve = clocked(lambda: resolver.resolve(name, base_model=BASE))  # noqa: B023
                milliseconds["resolve"].append(resolve)
                milliseconds[way].append(resolve + clocked(lambda: by_plugin(resolver, name)))  # noqa: B023
        shutil.rmtree(folder)
    ratios = [ours / theirs for ours, theirs in zip(milliseconds["plugin"], milliseconds["folder"], strict=True)]
    medians = {way: round(median(values), 1) for way, values in milliseconds.items()}
    return {
        "milliseconds": medians,
        "median_ratio": round(median(ratios), 2),
        "ratios": sorted(round(r, 2) for r in ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Members of a store in vLLM's own loader.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        store = make_store(work / "shop")
        export_lora(store, work / "folders" / "one", adapter_name=store.names[0])
        one = sum(path.stat().st_size for path in (work / "folders" / "one").iterdir())
        cache = LoraCache(work / "cache", max_bytes=int(N_CACHED * one * 1.05))
        resolver = AdapterResolver(StoreCatalog([work / "shop"]), cache=cache, max_rank=RANK, base_models=[BASE])
        largest, worst, n_loaded = 0, 0.0, 0
        for name in store.names:
            worst = max(worst, difference(by_plugin(resolver, f"shop/{name}"), store, name))
            largest, n_loaded = max(largest, cache.n_bytes), n_loaded + 1
        members = {"loaded": n_loaded, "largest_relative_difference": worst}
        results = {"all_members": members | {"cache_bound": cache.max_bytes, "largest_cache": largest}}
        print(results, flush=True)
        results["first"] = first_loads(resolver, store, list(store.names[:N_TIMED]), work)
    print(json.dumps(results, indent=2))
    assert n_loaded == N_MEMBERS
    assert largest <= cache.max_bytes
    assert worst < 1e-5
    arguments.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
