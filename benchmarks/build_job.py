"""The whole job: a subspace from 500 adapters of a 7B model on disk, with one process and with two, beside the machine's limit.

Command:  python benchmarks/build_job.py                     (writes and deletes 13.6 GB under --scratch)
          python benchmarks/build_job.py --layers 4          (an eighth of it: 16 of the 128 modules)
Hardware: CPU, one thread per process.
Writes:   benchmarks/results/build_job.json: wall-clock and CPU seconds of `eigenpeft build` with 1 and 2 processes
          (torchrun), their peak memory, and whether both wrote the same bytes; and the limit, measured in the same run:
          reading all files once from disk, and multiplying every stack of factors once with 64 directions, in float32 on
          one core.

The adapters have rank 16, bfloat16, on q, k, v, o of Mistral-7B's shapes (grouped queries: k and v have 1024 outputs). Their
factors share a spectrum that falls a decade every 64 directions, under noise; every file is another draw.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import eigenpeft

RESULTS = Path(__file__).parent / "results"
SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
RANK, K, WIDTH = 16, 64, 128


def write_adapters(folder, *, n_adapters, n_layers):
    """The files; noise is cut from one long sequence at random places, which is 20 times faster than drawing it."""
    generator = torch.Generator().manual_seed(0)
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(n_layers) for name in SHAPES]
    bank = torch.randn(1 << 24, generator=generator)
    spectrum = (10 ** (-torch.arange(WIDTH) / 64.0))[:, None]
    shared = {
        (module, side): torch.randn(WIDTH, SHAPES[module.split(".")[-1]][side], generator=generator) * spectrum / 64.0
        for module in modules
        for side in (0, 1)
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "mistral-7b-shapes", "task_type": "CAUSAL_LM"}
    config |= {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(SHAPES)}
    for i in range(n_adapters):
        tensors = {}
        for (module, side), directions in shared.items():
            rows = torch.randn(RANK, WIDTH, generator=generator) @ directions
            start = int(torch.randint(len(bank) - rows.numel(), (1,), generator=generator))
            rows += 0.02 / 64.0 * bank[start : start + rows.numel()].view_as(rows)
            key = f"base_model.model.{module}.lora_{'BA'[side]}.weight"
            tensors[key] = (rows.mT if side == 0 else rows).to(torch.bfloat16).contiguous()
        place = folder / f"adapter-{i:03}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))


def evict(folder):
    """Ask the kernel to forget the files, so that they are read from disk."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limit(folder, *, n_adapters, n_layers):
    """Seconds to read all files once from disk, and CPU seconds to multiply all stacks once with K directions."""
    evict(folder)
    start = time.perf_counter()
    buffer = bytearray(1 << 24)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read = time.perf_counter() - start
    multiply = 0.0
    for width in sorted({width for shape in SHAPES.values() for width in shape}):
        rows, block = torch.randn(n_adapters * RANK, width), torch.randn(width, K)
        count = n_layers * sum(shape.count(width) for shape in SHAPES.values())
        rows @ block
        start = time.process_time()
        for _ in range(3):
            rows @ block
        multiply += count * (time.process_time() - start) / 3
    return {"read_seconds": read, "multiply_cpu_seconds": multiply}


class PeakMemory:
    """Largest sum over a process and its descendants of their memory, looked at 20 times a second.

    `anonymous` is what they allocated; `resident` adds the pages of the adapter files that happen to be mapped, which
    belong to the page cache and are given back whenever memory is short.
    """

    def __init__(self, root):
        self.root, self.anonymous, self.resident, self.largest = root, 0, 0, 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        while self.root.poll() is None:
            sizes = [self._size(pid) for pid in self._family()]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in sizes))
            self.resident = max(self.resident, sum(resident for _, resident in sizes))
            self.largest = max([self.largest, *(anonymous for anonymous, _ in sizes)])
            time.sleep(0.05)

    def _family(self):
        found, new = [], [self.root.pid]
        while new:
            found += new
            new = [child for pid in new for child in self._children(pid)]
        return found

    @staticmethod
    def _children(pid):
        try:
            return [
                int(word)
                for task in Path(f"/proc/{pid}/task").iterdir()
                for word in (task / "children").read_text().split()
            ]
        except OSError:
            return []

    @staticmethod
    def _size(pid):
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            return 0, 0
        anonymous, resident = (int(lines.get(name, "0 kB").split()[0]) / 1e3 for name in ("RssAnon", "VmRSS"))
        return anonymous, resident


def build(folder, out, *, n_processes, extra=()):
    """One `eigenpeft build`; wall-clock and CPU seconds, peak memory, hash of the tensors."""
    evict(folder)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_processes)] if n_processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "eigenpeft",
        "build",
        str(folder),
        "-k",
        str(K),
        "--out",
        str(out),
        *extra,
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    peak = PeakMemory(process)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "processes": n_processes,
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_anonymous_mb": round(peak.anonymous),
        "peak_anonymous_mb_of_one_process": round(peak.largest),
        "peak_resident_mb": round(peak.resident),
        "load_average": os.getloadavg()[0],
        "sha256": hashlib.sha256((out / "subspace.safetensors").read_bytes()).hexdigest(),
        "missed_share_bound": json.loads((out / "subspace_config.json").read_text())["missed_share_bound"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "eigenpeft-build-job")
    parser.add_argument("--n-adapters", type=int, default=500)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streamed", action="store_true", help="also build within --memory-limit 300MB")
    parser.add_argument("--keep", action="store_true", help="leave the files, to run again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.scratch / f"adapters-{arguments.n_adapters}-{arguments.layers}"
    sizes = {"n_adapters": arguments.n_adapters, "n_layers": arguments.layers}
    if not folder.exists():
        start = time.perf_counter()
        write_adapters(folder, **sizes)
        print(f"wrote the adapters in {time.perf_counter() - start:.0f} s", flush=True)
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    try:
        bound = limit(folder, **sizes)
        print(f"{n_bytes / 1e9:.2f} GB; limit: {bound}", flush=True)
        runs = []
        for n_processes in arguments.processes:
            runs.append(build(folder, arguments.scratch / f"out-{n_processes}", n_processes=n_processes))
            print(json.dumps(runs[-1]), flush=True)
        streamed = None
        if arguments.streamed:
            streamed = build(
                folder, arguments.scratch / "out-limited", n_processes=1, extra=("--memory-limit", "300MB")
            )
            print(json.dumps(streamed), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.scratch)
    record = {
        **sizes,
        "rank": RANK,
        "K": K,
        "share_of_the_full_job": arguments.layers / 32,
        "n_bytes": n_bytes,
        "limit": bound,
        "runs": runs,
        "memory_limit_300MB": streamed,
        "same_bytes": len({run["sha256"] for run in runs}) == 1 if len(runs) > 1 else None,
        "environment": {
            "eigenpeft": eigenpeft.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads_a_process": 1,
        },
    }
    wall, cpu = runs[-1]["wall_seconds"], runs[-1]["cpu_seconds"] / runs[-1]["processes"]
    least = max(bound["read_seconds"], bound["multiply_cpu_seconds"])
    record["times_limit"] = {"wall": wall / least, "cpu_of_one_process": cpu / least}
    print(f"same bytes: {record['same_bytes']}; times the limit: {record['times_limit']}")
    arguments.out.mkdir(exist_ok=True)
    name = "build_job.json" if arguments.layers == 32 else f"build_job_{arguments.layers}_layers.json"
    (arguments.out / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
