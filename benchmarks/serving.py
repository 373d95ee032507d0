"""What does it cost to serve many tasks in one batch, in time, memory and loading?

Command:  python benchmarks/serving.py            (about 4 minutes; --quick: fewer rounds, about 2)
Hardware: CPU, one thread; 3 GB of memory. Times are CPU milliseconds of interleaved runs in one process, medians.
Writes:   benchmarks/results/serving.json and serving.png: the forward pass of one layer, base output given, for 64 rows of 64
          tasks; one whole decoding step of a small Llama; bytes and loading time of 1,000 tasks on the shapes of Mistral-7B.

"PEFT adapter_names" is PEFT's own mixed batch with 64 LoRA adapters of the same rank, "AdapterBank" the forward hook of a bank with
1,000 tasks, "PEFT path, EigenLoRA" `adapter_names` with 64 EigenLoRA adapters of one subspace. All compute the same kind of
update; the bank's rows are checked against the loop in tests/tuners/serving/test_bank.py.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from layer import random_subspace
from peft import LoraConfig, get_peft_model
from timing import environment, interleaved
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eigenpeft import AdapterStore, EigenLoraConfig
from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.tuners.serving.bank import AdapterBank

RESULTS = Path(__file__).parent / "results"
N_ROWS, N_TASKS = 64, 1000
SHAPES = [  # n, tokens per row, K, r
    (768, 1, 32, 8),
    (768, 1, 64, 16),
    (768, 128, 32, 16),
    (768, 128, 64, 16),
    (4096, 1, 32, 8),
    (4096, 1, 32, 16),
    (4096, 1, 64, 16),
    (4096, 8, 32, 16),
    (4096, 32, 32, 16),
    (4096, 128, 32, 16),
    (4096, 128, 64, 16),
]
PEFT, OURS, OURS_IN_PEFT, ONE = "PEFT adapter_names", "AdapterBank", "PEFT path, EigenLoRA", "PEFT, one adapter"
MISTRAL = {
    f"model.layers.{layer}.self_attn.{name}": (width, 4096)
    for layer in range(32)
    for name, width in (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 4096))
}


def random_bank(subspace, *, n_tasks, rank):
    """A bank of random coefficients."""
    generator = torch.Generator().manual_seed(0)
    coefficients = {
        name: (
            torch.randn(n_tasks, rank, bases.n_components, generator=generator),
            torch.randn(n_tasks, bases.n_components, rank, generator=generator),
        )
        for name, bases in subspace.items()
    }
    return AdapterBank(subspace, names=[f"task-{i}" for i in range(n_tasks)], coefficients=coefficients)


def peft_model(make_base, config_of_each, n_adapters):
    """A model of PEFT's with adapters "task-0", "task-1", ... away from zero."""
    model = get_peft_model(make_base(), config_of_each(), adapter_name="task-0")
    for i in range(1, n_adapters):
        model.add_adapter(f"task-{i}", config_of_each())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def base_of_one_layer(n, length):
    """A model of one linear layer whose output is at hand; like PEFT's loop, the bank adds to it in place."""
    layer = nn.Linear(1, 1, bias=False)
    layer.in_features = layer.out_features = n
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(n, n), requires_grad=False)
    output = torch.randn(N_ROWS, length, n)
    layer.forward = lambda x: output
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model


def measure_layer(n, length, n_components, rank, *, rounds, seconds):
    """One row of the table."""
    torch.manual_seed(0)
    x = torch.randn(N_ROWS, length, n)
    names = [f"task-{i}" for i in range(N_ROWS)]
    subspace = random_subspace({"layer": (n, n)}, n_components)
    eigenlora = EigenLoraConfig(subspace=subspace, r=rank, target_modules=["layer"])
    lora = peft_model(
        lambda: base_of_one_layer(n, length), lambda: LoraConfig(r=rank, target_modules=["layer"]), N_ROWS
    ).base_model.model.layer
    eigen = peft_model(lambda: base_of_one_layer(n, length), lambda: eigenlora, N_ROWS).base_model.model.layer
    served = base_of_one_layer(n, length)
    bank = random_bank(subspace, n_tasks=N_TASKS, rank=rank)
    bank.attach(served)

    def with_bank():
        with bank.use(names):
            return served(x)

    functions = {
        PEFT: lambda: lora(x, adapter_names=names),
        OURS: with_bank,
        OURS_IN_PEFT: lambda: eigen(x, adapter_names=names),
        ONE: lambda: lora(x),
    }
    with torch.no_grad():
        times = interleaved(functions, rounds=rounds, seconds=seconds)
    return {
        "n": n,
        "tokens_a_row": length,
        "K": n_components,
        "r": rank,
        "milliseconds": times,
        "speedup": times[PEFT] / times[OURS],
        "speedup_in_peft": times[PEFT] / times[OURS_IN_PEFT],
    }


def decoding_step(*, rounds, seconds):
    """One step of a whole model with 64 rows of 64 tasks; one token per row and no cache, so that nothing grows."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=1000,
        use_cache=False,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    tokens = torch.randint(0, 1000, (N_ROWS, 1))
    names = [f"task-{i}" for i in range(N_ROWS)]
    shapes = {name: tuple(m.weight.shape) for name, m in base().named_modules() if name.endswith(tuple(targets))}
    lora = peft_model(base, lambda: LoraConfig(r=16, target_modules=targets), N_ROWS)
    served, alone = base(), base()
    bank = random_bank(random_subspace(shapes, 32), n_tasks=N_TASKS, rank=16)
    bank.attach(served)

    def with_bank():
        with bank.use(names):
            return served(input_ids=tokens)

    functions = {
        PEFT: lambda: lora(input_ids=tokens, adapter_names=names),
        OURS: with_bank,
        "base model alone": lambda: alone(input_ids=tokens),
    }
    with torch.no_grad():
        times = interleaved(functions, rounds=rounds, seconds=seconds)
    return {"model": "Llama, 6 layers of 768, q, k, v, o", "K": 32, "r": 16, "milliseconds": times}


def memory_and_loading():
    """1,000 tasks on the shapes of Mistral-7B, in bfloat16; then the same from a store on disk, for one layer in eight."""
    rank, n_components = 16, 32
    subspace = random_subspace(MISTRAL, n_components)
    bank = random_bank(subspace, n_tasks=N_TASKS, rank=rank).to(torch.bfloat16)
    lora = 2 * rank * sum(m + n for m, n in MISTRAL.values()) * N_TASKS
    part = {name: shape for name, shape in MISTRAL.items() if int(name.split(".")[2]) % 8 == 0}
    few = random_subspace(part, n_components)
    generator = torch.Generator().manual_seed(0)

    def core():
        sides = (
            torch.randn(rank, n_components, generator=generator),
            torch.randn(n_components, rank, generator=generator),
        )
        return Core("low_rank", {"coefficients_in": sides[0], "coefficients_out": sides[1]})

    members = {f"task-{i}": AdapterMember({name: core() for name in few}) for i in range(N_TASKS)}
    store = AdapterStore(few, members=members)
    with tempfile.TemporaryDirectory() as scratch:
        store.save_pretrained(Path(scratch) / "store")
        start_cpu, start = time.process_time(), time.perf_counter()
        AdapterBank.from_store(AdapterStore.from_pretrained(Path(scratch) / "store"), dtype=torch.bfloat16)
        cpu, wall = time.process_time() - start_cpu, time.perf_counter() - start
        size = sum(path.stat().st_size for path in (Path(scratch) / "store").rglob("*") if path.is_file())
    return {
        "n_tasks": N_TASKS,
        "n_modules": len(MISTRAL),
        "K": n_components,
        "r": rank,
        "bank_bytes": bank.n_bytes,
        "lora_bytes": lora,
        "lora_vs_bank": lora / bank.n_bytes,
        "loading": {"n_modules": len(part), "file_bytes": size, "cpu_seconds": cpu, "wall_seconds": wall},
    }


def chart(rows, path):
    """Speed-ups over PEFT's loop."""
    figure, axes = new_figure(1, 1, width=9, height=4.5)
    places = range(len(rows))
    for shift, key, name in ((-0.2, "speedup", OURS), (0.2, "speedup_in_peft", OURS_IN_PEFT)):
        axes.bar([place + shift for place in places], [row[key] for row in rows], width=0.4, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8, label=PEFT)
    labels = ["n {n}, K {K}, r {r}\n{tokens_a_row} tokens".format(**row) for row in rows]
    axes.set_xticks(list(places), labels, rotation=90, fontsize=8)
    axes.set(ylabel="times faster than PEFT adapter_names", title="64 rows of 64 tasks, forward pass of the adapters")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seconds = (3, 0.5) if arguments.quick else (7, 2.0)
    rows = []
    for shape in SHAPES:
        row = measure_layer(*shape, rounds=rounds, seconds=seconds)
        rows.append(row)
        times = "  ".join(f"{name} {value:.2f} ms" for name, value in row["milliseconds"].items())
        print(
            "n {n} S {tokens_a_row} K {K} r {r}: ".format(**row),
            f"{times}  bank {row['speedup']:.1f}x, in PEFT {row['speedup_in_peft']:.1f}x",
            flush=True,
        )
    whole = decoding_step(rounds=rounds, seconds=seconds)
    print(whole["model"], "  ".join(f"{name} {value:.1f} ms" for name, value in whole["milliseconds"].items()))
    memory = memory_and_loading()
    print(
        f"{N_TASKS} tasks: {memory['bank_bytes'] / 1e9:.3f} GB against {memory['lora_bytes'] / 1e9:.1f} GB of LoRAs "
        f"({memory['lora_vs_bank']:.0f} times less); loading {memory['loading']}"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "rounds": rounds, "layer": rows, "decoding_step": whole, "memory": memory}
    (arguments.out / "serving.json").write_text(json.dumps(record, indent=1) + "\n")
    chart(rows, arguments.out / "serving.png")


if __name__ == "__main__":
    main()
