"""What does EigenLoRA's layer cost beside PEFT's LoRA, VeRA and the reference layer's formula?

Command:  python benchmarks/layer.py            (about 6 minutes; --quick: fewer rounds, about 2)
Hardware: CPU, one thread, float32; 2 GB of memory. Times are CPU milliseconds of interleaved runs in one process, medians.
Writes:   benchmarks/results/layer.json and layer.png: one forward and backward pass of a layer whose base output is given, for
          several widths n, tokens T, components K and ranks r; bytes kept for the backward pass, parameters not counted; and a
          whole training step of all-MiniLM-L6-v2.

"PEFT LoRA" and "EigenLoRA" are the real layers of both packages around a base layer that returns a tensor at hand. "reference
formula" is how the EigenLoRAx authors' layer computes, written anew here: both factors are made from the product of
components (n, K, 1) and coefficients (1, K, r), summed over K, in every forward pass. "VeRA" has rank 256, as its paper.
The last table takes 16 sentences of 128 tokens through a real encoder, with adapters of rank 16 on all its linear layers.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from timing import environment, interleaved
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification

from eigenpeft import EigenLoraConfig, PrincipalSubspace
from eigenpeft.demo.assets import base_model
from eigenpeft.linalg.layer_update import choose_route
from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.subspace import ModuleSubspace

RESULTS = Path(__file__).parent / "results"
SHAPES = [  # n, T, K, r
    (768, 256, 32, 16),
    (768, 4096, 32, 16),
    (4096, 16, 32, 16),
    (4096, 256, 32, 8),
    (4096, 256, 32, 16),
    (4096, 256, 64, 8),
    (4096, 256, 64, 16),
    (4096, 256, 256, 32),
    (4096, 4096, 32, 8),
    (4096, 4096, 32, 16),
    (4096, 4096, 64, 8),
    (4096, 4096, 64, 16),
]
LORA, OURS, REFERENCE, VERA = "PEFT LoRA r16", "EigenLoRA", "reference formula", "VeRA r256"
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


class Given(nn.Linear):
    """A base layer whose output is at hand, so that the adapter alone is measured."""

    def __init__(self, features):
        super().__init__(1, 1, bias=False)
        self.in_features = self.out_features = features
        self.output = None

    def forward(self, x):
        return self.output


def random_subspace(shapes, n_components):
    """Random orthonormal bases: what a layer costs does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, (out_features, in_features) in shapes.items():
        sides = [
            torch.linalg.qr(torch.randn(width, n_components, generator=generator))[0].mT.contiguous()
            for width in (in_features, out_features)
        ]
        spectrum = torch.ones(n_components)
        modules[name] = ModuleSubspace(
            *sides,
            singular_values_in=spectrum,
            singular_values_out=spectrum,
            explained_variance_ratio=spectrum / n_components,
        )
    return PrincipalSubspace(modules)


def peft_layer(n, n_tokens, config):
    """A layer of PEFT's, its coefficients away from zero, and its inputs."""
    model = nn.Sequential()
    model.add_module("layer", Given(n))
    model = get_peft_model(model, config)
    layer = model.base_model.model.layer
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    layer.base_layer.output = torch.randn(n_tokens, n, requires_grad=True)
    return layer, parameters, layer.base_layer.output


def step(layer, x, y, parameters, grad):
    """One forward and backward pass as a function without arguments."""

    def run():
        return torch.autograd.grad(layer(x), [x, y, *parameters], grad)

    return run


def reference_layer(n, n_components, rank, y):
    """The formula of the reference layer."""
    bases = [torch.randn(n, n_components) / n**0.5 for _ in range(2)]
    coefficients = [torch.randn(n_components, rank, requires_grad=True) for _ in range(2)]

    def layer(x):
        lora_A, lora_B = (
            (basis[:, :, None] * own[None]).sum(1) for basis, own in zip(bases, coefficients, strict=True)
        )  # (n, r) each
        return y + 0.5 * ((x @ lora_A) @ lora_B.mT)

    return layer, coefficients


def vera_layer(n, y):
    """VeRA: two random matrices shared by all layers, two trained vectors."""
    matrix_in, matrix_out = torch.randn(256, n) / 16, torch.randn(n, 256) / n**0.5
    diagonals = [torch.full((256,), 0.1, requires_grad=True), torch.randn(n, requires_grad=True)]
    return lambda x: y + diagonals[1] * linear(diagonals[0] * linear(x, matrix_in), matrix_out), diagonals


def kept_bytes(layer, x, y):
    """Bytes of the storages that the backward pass keeps alive, but for parameters and buffers."""
    lasting = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict().values()}
    lasting |= {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(kept.values())


def measure_layer(n, n_tokens, n_components, rank, *, rounds, seconds):
    """One row of the table."""
    torch.manual_seed(0)
    x, grad = torch.randn(n_tokens, n, requires_grad=True), torch.randn(n_tokens, n)
    lora = peft_layer(n, n_tokens, LoraConfig(r=16, target_modules=["layer"]))
    subspace = random_subspace({"layer": (n, n)}, n_components)
    ours = peft_layer(n, n_tokens, EigenLoraConfig(subspace=subspace, r=rank, target_modules=["layer"]))
    y = lora[2]
    layers = {LORA: lora, OURS: ours, REFERENCE: (*reference_layer(n, n_components, rank, y), y)}
    if n_components == 32 and rank == 16:
        layers[VERA] = (*vera_layer(n, y), y)
    steps = {name: step(layer, x, y_, parameters, grad) for name, (layer, parameters, y_) in layers.items()}
    times = interleaved(steps, rounds=rounds, seconds=seconds)
    kept = {name: kept_bytes(layers[name][0], x, y) for name in (LORA, OURS)}
    return {
        "n": n,
        "T": n_tokens,
        "K": n_components,
        "r": rank,
        "route": choose_route(n_tokens, n_components=n_components, rank=rank)._asdict(),
        "milliseconds": times,
        "kept_bytes": kept,
        "time_vs_lora": times[OURS] / times[LORA],
        "reference_vs_ours": times[REFERENCE] / times[OURS],
        "kept_vs_lora": kept[OURS] / kept[LORA],
    }


def training_steps(*, n_components, rounds, seconds):
    """Whole steps of a real encoder: forward, backward, no optimiser."""
    torch.manual_seed(0)
    tokens = torch.randint(1000, 2000, (16, 128))
    labels = torch.zeros(16, dtype=torch.int64)

    def encoder():
        return AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=2)

    shapes = {
        name: tuple(module.weight.shape)
        for name, module in encoder().named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(suffix) for suffix in LINEARS)
    }
    subspace = random_subspace(shapes, n_components)
    configs = {
        LORA: LoraConfig(r=16, target_modules=LINEARS, task_type="SEQ_CLS"),
        OURS: EigenLoraConfig(subspace=subspace, r=16, target_modules=LINEARS, task_type="SEQ_CLS"),
    }
    steps, kept = {}, {}
    for name, config in configs.items():
        model = get_peft_model(encoder(), config).train()

        def run(model=model):
            model.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()

        steps[name] = run
        kept[name] = kept_bytes_of_model(model, tokens, labels)
    times = interleaved(steps, rounds=rounds, seconds=seconds)
    return {
        "K": n_components,
        "r": 16,
        "n_layers": len(shapes),
        "milliseconds": times,
        "kept_bytes": kept,
        "time_vs_lora": times[OURS] / times[LORA],
        "kept_vs_lora": kept[OURS] / kept[LORA],
    }


def kept_bytes_of_model(model, tokens, labels):
    """`kept_bytes` of a whole model."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(input_ids=x, labels=labels).loss

    return kept_bytes(Whole(), tokens, None)


def chart(rows, path):
    """Times as multiples of PEFT's LoRA, and bytes kept."""
    figure, (times, kept) = new_figure(1, 2, width=13, height=4.5)
    labels = [f"n {row['n']}, T {row['T']}\nK {row['K']}, r {row['r']}" for row in rows]
    places = range(len(rows))
    for shift, name, color in ((-0.2, OURS, "tab:blue"), (0.2, REFERENCE, "tab:orange")):
        ratios = [row["milliseconds"][name] / row["milliseconds"][LORA] for row in rows]
        times.bar([place + shift for place in places], ratios, width=0.4, label=name, color=color)
    times.axhline(1.0, color="black", linewidth=0.8, label=LORA)
    times.set(yscale="log", ylabel="CPU time / PEFT LoRA's", title="Forward and backward pass of the adapter")
    times.legend()
    kept.bar(places, [100 * row["kept_vs_lora"] for row in rows], color="tab:blue")
    kept.set(ylabel="% of PEFT LoRA's", title="Bytes kept for the backward pass")
    for axes in (times, kept):
        axes.set_xticks(list(places), labels, rotation=90, fontsize=7)
        axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rounds, seconds = (3, 0.5) if arguments.quick else (7, 2.0)
    rows = []
    print(f"{'n':>5} {'T':>5} {'K':>4} {'r':>3}  {'LoRA ms':>8} {'ours ms':>8}  vs LoRA  vs reference  kept vs LoRA")
    for shape in SHAPES:
        row = measure_layer(*shape, rounds=rounds, seconds=seconds)
        rows.append(row)
        print(
            "{n:>5} {T:>5} {K:>4} {r:>3}".format(**row),
            f" {row['milliseconds'][LORA]:8.2f} {row['milliseconds'][OURS]:8.2f}  {row['time_vs_lora']:6.2f}x "
            f"{row['reference_vs_ours']:12.1f}x {row['kept_vs_lora']:12.2%}",
            flush=True,
        )
    whole = [
        training_steps(n_components=k, rounds=rounds, seconds=3 * seconds)
        for k in ((32,) if arguments.quick else (32, 64))
    ]
    for row in whole:
        print(
            f"MiniLM, K {row['K']}: {row['milliseconds'][OURS]:.0f} ms against {row['milliseconds'][LORA]:.0f} "
            f"({row['time_vs_lora']:.2f}x), kept {row['kept_vs_lora']:.0%}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "rounds": rounds, "layer": rows, "training_step": whole}
    (arguments.out / "layer.json").write_text(json.dumps(record, indent=1) + "\n")
    chart(rows, arguments.out / "layer.png")


if __name__ == "__main__":
    main()
