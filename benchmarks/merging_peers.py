"""The weighted sum of ten adapters by PEFT's combination types and by `merge`: error against the exact sum, seconds.

Command:  python benchmarks/merging_peers.py --work DIR          (about a minute)
          python -m venv .peers && .peers/bin/pip install torch==2.13.0 vlora-dev==1.0.0 fusion-bench==0.2.33
          python benchmarks/merging_peers.py --work DIR --peers-python .peers/bin/python
Writes:   benchmarks/results/merging_peers.json

Three zoos of the ten shipped adapters of all-MiniLM-L6-v2: as they are (rank 8, alpha 16); the same factors read as rsLoRA; and
mixed ranks (every second adapter cut to rank 4, alpha 4). Weights 1/10. Errors are ‖ΔW - Σ w ΔW_t‖ / ‖Σ w ΔW_t‖ over all modules,
float64, from the updates that PEFT computes of what each tool made. "svd" at the full rank of the sum, so that a right result has
error 0. TIES and DARE claim no sum; their rows say how far from it they go. mergekit 0.1.5 does not plan a
merge of BERT models (TypeError in its plan.py); it stands in merging_full_weights.py.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from timing import environment
from transformers import AutoModel, AutoModelForSequenceClassification

from eigenpeft import merge
from eigenpeft.combining.sources import CollectionSources, open_sources
from eigenpeft.demo.assets import base_model, shipped_adapters

PEFT_TYPES = {
    "cat": {},
    "svd": {"svd_rank": 80},
    "linear": {},
    "ties": {"density": 0.2},
    "ties_svd": {"density": 0.2, "svd_rank": 80},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5, "svd_rank": 80},
    "dare_ties_svd": {"density": 0.5, "svd_rank": 80},
    "magnitude_prune": {"density": 0.2},
    "magnitude_prune_svd": {"density": 0.2, "svd_rank": 80},
}
OURS = {"task_arithmetic": {}, "ties": {"density": 0.2}, "dare": {"drop": 0.5}, "tsv": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("merging-work"))
    parser.add_argument("--peers-python", help="Python that has vlora-dev and fusion-bench")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"command": "python benchmarks/merging_peers.py", "environment": environment(), "zoos": {}}
    for zoo, folders in make_zoos(arguments.work).items():
        exact = exact_sum(folders)
        rows = {}
        for method, options in OURS.items():
            start = time.process_time()
            merged = merge(folders, rule=method, weights=[1 / len(folders)] * len(folders), progress=False, **options)
            seconds = time.process_time() - start
            found = {name: B.double() @ A.double() for name, (B, A) in merged.factors.items()}
            rows[f"eigenpeft {method}"] = {"error": relative_error(found, exact), "cpu_seconds": round(seconds, 2)}
        model = load_all(folders)
        names = [folder.name for folder in folders]
        for combination, options in PEFT_TYPES.items():
            rows[f"PEFT {combination}"] = by_peft(model, names, combination, options, exact)
        if arguments.peers_python:
            rows |= by_peers(
                arguments.peers_python, arguments.work / "peers" / "made" / zoo.replace(" ", "_"), folders, exact
            )
        results["zoos"][zoo] = rows
        for name, row in rows.items():
            print(zoo, name, row, flush=True)
    (Path(__file__).parent / "results" / "merging_peers.json").write_text(json.dumps(results, indent=1) + "\n")


def by_peft(model, names, combination, options, exact):
    torch.manual_seed(0)
    start = time.process_time()
    try:
        model.add_weighted_adapter(
            names, [1 / len(names)] * len(names), "made", combination_type=combination, **options
        )
    except ValueError as error:
        return {"error": None, "message": str(error)[:200]}
    seconds = time.process_time() - start
    found = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("made").double()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and "made" in layer.lora_A
    }
    model.delete_adapter("made")
    return {"error": relative_error(found, exact), "cpu_seconds": round(seconds, 2)}


def by_peers(python, work, folders, exact):
    """Other packages, each in a process of its own: on the adapters, or on models with an adapter merged in each."""
    models = [work / "models" / folder.name for folder in folders]
    base = work / "models" / "base"
    AutoModel.from_pretrained(base_model()).save_pretrained(base)
    for folder, model in zip(folders, models, strict=True):
        merged, whole = merge(folder, progress=False), AutoModel.from_pretrained(base_model())
        merged.apply_to(whole)
        whole.save_pretrained(model)
    rows = {}
    for tool, methods, inputs in (
        ("vlora", ("task_arithmetic", "ties", "dare"), folders),
        ("fusion_bench", ("ties",), models),
    ):
        for method in methods:
            out = work / tool / method
            shutil.rmtree(out, ignore_errors=True)
            command = [python, Path(__file__).with_name("merging_peers_worker.py"), tool, method, base, out, *inputs]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if done.returncode:
                rows[f"{tool} {method}"] = {"error": None, "message": done.stderr.strip().splitlines()[-1][:200]}
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            if tool == "vlora":
                found = {name: B.double() @ A.double() for name, (B, A) in merge(out, progress=False).factors.items()}
            else:
                found = {
                    key.removesuffix(".weight"): value.double()
                    for key, value in load_file(out / "delta.safetensors").items()
                }
            found = {
                name: next(value for key, value in found.items() if name.endswith(key) or key.endswith(name))
                for name in exact
            }
            rows[f"{tool} {method}"] = {"error": relative_error(found, exact), **row}
    return rows


def exact_sum(folders):
    sources = open_sources(folders)
    assert isinstance(sources, CollectionSources)
    return {
        module: sum(B.double() @ A.double() for B, A in sources.updates(module).values()) / len(folders)
        for module in sources.modules
    }


def relative_error(found, exact):
    difference = sum(float((found[name] - update).norm()) ** 2 for name, update in exact.items())
    return (difference / sum(float(update.norm()) ** 2 for update in exact.values())) ** 0.5


def load_all(folders):
    base = AutoModelForSequenceClassification.from_pretrained(base_model())
    # Heads differ in their number of labels and are no part of a sum: configurations without them.
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model


def make_zoos(work):
    """Folders of the three zoos, without heads."""
    zoos = {"rank 8": [], "rsLoRA": [], "mixed ranks": []}
    for i, source in enumerate(sorted(path for path in shipped_adapters().iterdir() if path.is_dir())):
        for zoo, made in zoos.items():
            place = work / "peers" / zoo.replace(" ", "_") / source.name
            shutil.rmtree(place, ignore_errors=True)
            rank = 4 if zoo == "mixed ranks" and i % 2 else 8
            place.parent.mkdir(parents=True, exist_ok=True)
            merged = merge(source, rank=rank, progress=False)
            merged.save_pretrained(place)
            strip_head(place, use_rslora=zoo == "rsLoRA")
            made.append(place)
    return zoos


def strip_head(place, *, use_rslora):
    path = place / "adapter_model.safetensors"
    save_file(
        {key: value for key, value in load_file(path).items() if ".lora_" in key}, path, metadata={"format": "pt"}
    )
    config = json.loads((place / "adapter_config.json").read_text())
    config |= {"task_type": None, "modules_to_save": None, "use_rslora": use_rslora}
    (place / "adapter_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
