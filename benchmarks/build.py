"""How fast and how exact is the decomposition behind a subspace? Beside the reference recipe and the usual alternatives.

Command:  python benchmarks/build.py                     (about 8 minutes; --quick: a smaller stack, under a minute)
Hardware: CPU, one thread; 4 GB of memory. Times are CPU seconds of interleaved runs in one process, medians.
Writes:   benchmarks/results/build.json and build.png: for every algorithm CPU seconds, the ratio to one GEMM of the smaller
          side, the missed squared norm (1 - captured / best possible one of K components, against float64), the deviation from
          orthonormality, and the peak memory beyond the input; then what gauge fixing costs in a whole fit, and how small
          an error of ΔW `project` can still tell in float32.

Two stacks of 500 adapters of rank 16 on a weight with 4096 inputs, K = 64: "decaying", a shared spectrum that falls a decade
every 64 directions, plus noise; and "near-flat", where the same signal drowns in the random start of each lora_A.
The reference recipe is Algorithm 1 of EigenLoRAx (arXiv 2502.04700) as its authors run it, written anew here: centre the
stack, form its covariance (or, for fewer rows than columns, its Gram matrix), and call the solver for general matrices.
"""

import argparse
import json
import os
import platform
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import matplotlib
import torch
from sklearn.decomposition import IncrementalPCA
from sklearn.utils.extmath import randomized_svd

import eigenpeft
from eigenpeft.linalg.bases.fitting import fit_bases
from eigenpeft.linalg.bases.incremental import merge_components
from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.factored import frobenius_norm, projection_residual

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after the backend is chosen)

RESULTS = Path(__file__).parent / "results"
GEMM = "one GEMM of the smaller side"
OURS = "eigenpeft"
REFERENCE = "reference recipe"


def decaying(n_rows, n_features, generator):
    """Rows with a shared spectrum that falls a decade every 64 directions, plus noise."""
    width = min(256, n_features)
    directions = torch.linalg.qr(torch.randn(n_features, width, generator=generator))[0].mT
    spectrum = 10 ** (-torch.arange(width) / 64.0)
    signal = (torch.randn(n_rows, width, generator=generator) * spectrum) @ directions
    return signal.add_(torch.randn(n_rows, n_features, generator=generator), alpha=0.02 / n_features**0.5)


def near_flat(n_rows, n_features, generator):
    """The same signal under a random start of unit variance: rows of lora_A that training hardly moved."""
    rows = decaying(n_rows, n_features, generator)
    return torch.randn(n_rows, n_features, generator=generator).add_(rows, alpha=3.0)


def reference(rows, k):
    """Centred covariance (or Gram matrix), eigenvectors by the solver for matrices without symmetry, no mean kept."""
    centred = rows - rows.mean(dim=0)
    tall = rows.shape[0] >= rows.shape[1]
    matrix = (centred.mT @ centred if tall else centred @ centred.mT) / (len(rows) - 1)
    values, vectors = torch.linalg.eig(matrix)
    leading = vectors.real[:, values.real.argsort(descending=True)[:k]]
    return torch.nn.functional.normalize(leading.mT if tall else leading.mT @ centred, dim=1)


def merged(rows, k):
    """One pass over parts of the stack, 2 K directions carried along."""
    components, values = rows.new_zeros(0, rows.shape[1]), rows.new_zeros(0)
    for part in rows.split(16 * k):
        step = merge_components(components, singular_values=values, rows=part, n_components=2 * k)
        components, values = step.components, step.singular_values
    return components[:k]


def eigh_of_smaller_side(rows, k):
    """Dense symmetric solver in float32."""
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.mT
    vectors = torch.linalg.eigh(tall.mT @ tall)[1][:, -k:].mT
    return vectors if tall is rows else torch.linalg.qr((vectors @ rows).mT)[0].mT


ALGORITHMS = {
    OURS: lambda rows, k: leading_components(rows, n_components=k).components,
    "eigenpeft, one pass (merge)": merged,
    "eigh of the smaller side": eigh_of_smaller_side,
    "torch.svd_lowrank": lambda rows, k: torch.svd_lowrank(rows, q=k, niter=2)[2].mT,
    "sklearn randomized_svd": lambda rows, k: torch.from_numpy(
        randomized_svd(rows.numpy(), k, n_iter=4, random_state=0)[2].copy()
    ),
}
SLOW = {
    REFERENCE: reference,
    "sklearn IncrementalPCA": lambda rows, k: torch.from_numpy(
        IncrementalPCA(k, batch_size=16 * k).fit(rows.numpy()).components_
    ),
    "thin SVD": lambda rows, k: torch.linalg.svd(rows, full_matrices=False)[2][:k],
}


def cpu_seconds(run, *arguments):
    """CPU seconds of one call, and what it returned."""
    start = time.process_time()
    result = run(*arguments)
    return time.process_time() - start, result


def status_megabytes(field):
    """A line of /proc/self/status in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak(sender, run, arguments):
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    before = status_megabytes("VmRSS")
    run(*arguments)
    sender.send(status_megabytes("VmHWM") - before)


def peak_megabytes(run, *arguments):
    """Peak resident memory of one call beyond what was there before, measured in a forked process."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender, run, arguments))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def captured(rows, components):
    """Energy of the rows in the span of components, in float64; the components need not be orthonormal."""
    basis = torch.linalg.qr(components.double().mT)[0]
    return sum(float((part.double() @ basis).square().sum()) for part in rows.split(1000))


def gram64(rows):
    """Gram matrix of the smaller side in float64."""
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.mT
    return sum(part.double().mT @ part.double() for part in tall.split(1000))


def compare(rows, k, *, rounds, slow_rounds, skip):
    """All algorithms on one stack, interleaved."""
    best = float(torch.linalg.eigvalsh(gram64(rows))[-k:].sum())
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.mT
    seconds, table = {GEMM: []}, {}
    tall.mT @ tall  # warms up
    for turn in range(max(rounds, slow_rounds)):
        algorithms = {**(ALGORITHMS if turn < rounds else {}), **(SLOW if turn < slow_rounds else {})}
        for name, run in algorithms.items():
            if name in skip:
                continue
            seconds[GEMM].append(cpu_seconds(lambda: tall.mT @ tall)[0])
            spent, components = cpu_seconds(run, rows, k)
            seconds.setdefault(name, []).append(spent)
            if name not in table:
                identity = torch.eye(k, dtype=torch.float64)
                table[name] = {
                    "missed_squared_norm": 1.0 - captured(rows, components) / best,
                    "not_orthonormal": float((components.double() @ components.double().mT - identity).abs().max()),
                    "peak_mb_beyond_input": round(peak_megabytes(run, rows, k), 1),
                }
    gemm = median(seconds[GEMM])
    report = {GEMM: {"cpu_seconds": gemm, "times_gemm": 1.0, "runs": len(seconds[GEMM])}}
    for name, row in table.items():
        spent = median(seconds[name])
        report[name] = {"cpu_seconds": spent, "times_gemm": spent / gemm, "runs": len(seconds[name]), **row}
    return report


def gauge_fixing(n_adapters, rank, n_features, k, *, rounds):
    """CPU seconds of a whole fit (both sides) and of the part that makes it independent of the factors' gauge."""
    generator = torch.Generator().manual_seed(1)
    rows_in, rows_out = (decaying(n_adapters * rank, n_features, generator) for _ in "io")
    factors = [
        (part_out.mT.contiguous(), part_in)
        for part_in, part_out in zip(rows_in.split(rank), rows_out.split(rank), strict=True)
    ]
    spent = {"fit": [], "raw": [], "balanced": []}
    for _ in range(rounds):
        spent["fit"].append(cpu_seconds(lambda: fit_bases(factors, n_components=k))[0])
        for rows in ("raw", "balanced"):
            spent[rows].append(cpu_seconds(lambda rows=rows: stack_factors(factors, rows=rows, weighting="equal"))[0])
    fit, raw, balanced = (median(spent[name]) for name in ("fit", "raw", "balanced"))
    return {
        "fit_cpu_seconds": fit,
        "stack_raw_cpu_seconds": raw,
        "stack_balanced_cpu_seconds": balanced,
        "gauge_share": (balanced - raw) / fit,
    }


def smallest_error(n_features, *, rank=16, k=64):
    """Relative ΔW errors that `projection_residual` reports in float32 for adapters whose true error is known."""
    generator = torch.Generator().manual_seed(2)
    bases = [torch.linalg.qr(torch.randn(n_features, k, generator=generator).double())[0].mT for _ in "io"]
    report = []
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        inside = torch.randn(rank, k, generator=generator).double() @ bases[0]
        outside = torch.randn(rank, n_features, generator=generator).double()
        outside -= (outside @ bases[0].mT) @ bases[0]
        lora_A = (inside + outside * (size * inside.norm() / outside.norm())).float()
        lora_B = (bases[1].mT @ torch.randn(k, rank, generator=generator).double()).float()
        components_in, components_out = (basis.float() for basis in bases)
        # The truth in float64 for the rounded adapter and the exact span of the rounded components.
        exact_in, exact_out = (torch.linalg.qr(basis.double().mT)[0].mT for basis in (components_in, components_out))
        delta = lora_B.double() @ lora_A.double()
        truth = float((delta - exact_out.mT @ (exact_out @ delta @ exact_in.mT) @ exact_in).norm() / delta.norm())
        norm = float(frobenius_norm(lora_B, lora_A))
        told = (
            float(projection_residual(lora_B, lora_A, components_out=components_out, components_in=components_in))
            / norm
        )
        core = (components_out @ lora_B) @ (lora_A @ components_in.mT)
        subtracted = max(float((lora_B @ lora_A).square().sum() - core.square().sum()), 0.0) ** 0.5 / norm
        report.append({"true": truth, "told": told, "off": told / truth - 1, "told_by_subtraction_float32": subtracted})
    return report


def chart(stacks, path, title):
    """Bars of the time relative to one GEMM, labelled with the missed squared norm."""
    figure, axes = pyplot.subplots(1, len(stacks), figsize=(6.5 * len(stacks), 4), sharey=True, squeeze=False)
    for axis, (name, report) in zip(axes[0], stacks.items(), strict=True):
        rows = sorted(report.items(), key=lambda item: item[1]["times_gemm"], reverse=True)
        bars = axis.barh(
            [label for label, _ in rows],
            [row["times_gemm"] for _, row in rows],
            color=["#c44e52" if label == OURS else "#8c8c8c" for label, _ in rows],
        )
        labels = [f"{row['times_gemm']:.2g}x" for _, row in rows]
        labels = [
            text + (f", misses {max(row['missed_squared_norm'], 0):.0e}" if "missed_squared_norm" in row else "")
            for text, (_, row) in zip(labels, rows, strict=True)
        ]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.35)
        axis.set_xlabel("CPU time relative to one GEMM of the smaller side")
        axis.set_title(f"{name} stack")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def environment():
    """What the numbers depend on."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-adapters", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--n-features", type=int, default=4096)
    parser.add_argument("--n-components", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="100 adapters, 1024 features, K = 16, one round; no record"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.n_adapters, arguments.n_features, arguments.n_components, arguments.rounds = 100, 1024, 16, 1
    torch.set_num_threads(1)
    n_rows, k = arguments.n_adapters * arguments.rank, arguments.n_components
    shape = {"n_adapters": arguments.n_adapters, "rank": arguments.rank, "n_features": arguments.n_features, "K": k}
    stacks = {}
    for name, make in (("decaying", decaying), ("near-flat", near_flat)):
        rows = make(n_rows, arguments.n_features, torch.Generator().manual_seed(0))
        # A thin SVD and the reference recipe take as long whatever the spectrum: once is enough.
        skip = ("thin SVD",) if name == "near-flat" else ()
        stacks[name] = compare(rows, k, rounds=arguments.rounds, slow_rounds=1, skip=skip)
        for label, row in stacks[name].items():
            print(
                f"{name:10} {label:28} {row['cpu_seconds']:8.2f} s {row['times_gemm']:7.2f} x GEMM"
                + (
                    f"  misses {row['missed_squared_norm']:9.1e}  orthonormal to {row['not_orthonormal']:.0e}"
                    f"  {row['peak_mb_beyond_input']:6.0f} MB"
                    if "missed_squared_norm" in row
                    else ""
                ),
                flush=True,
            )
        print(
            f"{name}: {stacks[name][REFERENCE]['cpu_seconds'] / stacks[name][OURS]['cpu_seconds']:.0f} x the reference"
        )
    gauge = gauge_fixing(arguments.n_adapters, arguments.rank, arguments.n_features, k, rounds=arguments.rounds)
    print(f"gauge fixing: {gauge['gauge_share']:.1%} of a fit of {gauge['fit_cpu_seconds']:.2f} s")
    errors = smallest_error(arguments.n_features)
    for row in errors:
        print(f"project: true error {row['true']:.3e}, told {row['told']:.3e} ({row['off']:+.2%})")
    if arguments.quick:
        return
    arguments.out.mkdir(exist_ok=True)
    record = {"shape": shape, "environment": environment(), "stacks": stacks, "gauge": gauge, "project": errors}
    (arguments.out / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    title = "{n_adapters} adapters x rank {rank} x {n_features} features, K = {K}, one thread".format(**shape)
    chart(stacks, arguments.out / "build.png", title)


if __name__ == "__main__":
    main()
