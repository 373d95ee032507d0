"""What does it cost to absorb one adapter into a store of 1,000 members, and what happens to the members?

Command:  python benchmarks/absorb.py            (--quick: 200 members)
Hardware: CPU, one thread. Wall seconds and CPU seconds of the process, medians over the rounds.
Writes:   benchmarks/results/absorb.json: seconds of `absorb` with a free number of components (members stay as they are) and with
          a bound (every member is moved); of `add`, which only projects, as the control; how many members were read back, how
          many have the same bytes, the largest difference of their logits, and what the bound lost.

The store has the shapes of the shipped adapters of MiniLM: 12 modules of 384 x 384, K = 32, r = 8, and a head of 6 labels. Its
members are random; the absorbed adapter is a random LoRA of r = 8, of which random bases hold nearly nothing.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from layer import random_subspace
from safetensors.torch import save_file
from store import MODULES, K, R, member
from timing import environment
from torch import nn

from eigenpeft import AdapterBank, AdapterStore
from eigenpeft.subspace.stores.store_files import write_store

RESULTS = Path(__file__).parent / "results"
N_DISTINCT = 200


def write_lora(folder, seed):
    """A LoRA adapter of random numbers, in PEFT's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out_features, in_features) in MODULES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(R, in_features, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out_features, R, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": R,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Stack(nn.Module):
    """The modules one after another with residual connections, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for module, (out_features, in_features) in MODULES.items():
            place: nn.Module = self
            *path, last = module.split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, nn.Linear(in_features, out_features))
        self.classifier = nn.Linear(384, 6)

    def forward(self, x, update=None):
        for module in MODULES:
            added = 0.0
            if update is not None:
                lora_B, lora_A = update[module]
                added = x @ lora_A.mT @ lora_B.mT
            x = nn.functional.normalize(x + self.get_submodule(module)(x) + added, dim=-1)
        return self.classifier(x)


def logits(store, names):
    """Logits of each member: served from a bank, and with the factors that are exported as a plain LoRA."""
    model, served, exported = Stack(), [], []
    x = torch.randn(1, 384, generator=torch.Generator().manual_seed(1))
    bank = AdapterBank.from_store(store, names=names)
    with torch.no_grad(), bank.attached(model):
        for name in names:
            with bank.use([name]):
                served.append(model(x))
    with torch.no_grad():
        exported = [model(x, store.subspace.reconstruct(store[name].cores)) for name in names]
    return torch.cat(served), torch.cat(exported)


def measure(call):
    """Wall and CPU seconds of one call, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    size = 200 if arguments.quick else 1000
    seconds = {what: {"wall": [], "cpu": []} for what in ("absorb", "absorb_within_K", "add")}
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = [member(seed).to_bytes() for seed in range(N_DISTINCT)]
        records = [(f"member-{number}", data[number % N_DISTINCT]) for number in range(size)]
        write_store(place / "store", random_subspace(MODULES, K), records, card="A benchmark.\n")
        write_lora(place / "new", 1)
        for number in range(arguments.rounds):
            for what, call in (
                ("absorb", lambda store: store.absorb(place / "new")),
                ("absorb_within_K", lambda store: store.absorb(place / "new", max_components=K)),
                ("add", lambda store: store.add(place / "new")),
            ):
                shutil.copytree(place / "store", place / what)
                store = AdapterStore.from_pretrained(place / what)
                names = store.names[:: max(1, size // 100)]
                before, stored = logits(store, names), dict(store._each())
                wall, cpu, report = measure(lambda call=call, store=store: call(store))
                seconds[what]["wall"].append(wall)
                seconds[what]["cpu"].append(cpu)
                if number == 0:
                    opened = AdapterStore.from_pretrained(place / what)
                    served, exported = logits(opened, names)
                    errors = list(opened["new"].relative_errors.values())
                    found[what] = {
                        "members_read_back": sum(1 for name in stored if opened[name] is not None),
                        "members_with_the_same_bytes": sum(
                            opened._records.read(name) == each for name, each in stored.items()
                        ),
                        "largest_difference_exported": float((exported - before[1]).abs().max()),
                        "largest_difference_in_a_bank": float((served - before[0]).abs().max()),
                        "largest_output": float(before[0].abs().max()),
                        "components": opened.subspace[next(iter(MODULES))].n_components,
                        "error_of_the_new_member": statistics.mean(errors),
                        "mean_loss_of_a_member": statistics.mean(report.lost.values())
                        if what == "absorb_within_K"
                        else 0,
                    }
                shutil.rmtree(place / what)
    summary = {
        what: {kind: statistics.median(values) for kind, values in each.items()} for what, each in seconds.items()
    }
    result = {
        "environment": environment(),
        "shapes": {"members": size, "modules": len(MODULES), "K": K, "r": R, "rounds": arguments.rounds},
        "seconds": summary,
        "found": found,
    }
    print(json.dumps(result, indent=1))
    if not arguments.quick:
        RESULTS.joinpath("absorb.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
