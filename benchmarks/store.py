"""What does a store of 10,000 members cost to open, read and extend, and what does a killed process leave?

Command:  python benchmarks/store.py            (--quick: 1,000 members and 10 kills)
Hardware: CPU, one thread; 1 GB of disk. Milliseconds, medians of many calls: wall time, and CPU time of the calling thread, which
          other programs on the machine change less.
Writes:   benchmarks/results/store.json: opening, reading one member, adding one, for stores of several sizes; bytes written by
          `add` over the bytes of the adapter's own file; what is found after kill -9 at random moments of `add` and `compact`;
          adding to and removing from a bank of 5,000 members while another thread serves, and every row it served, checked.

Members have the shapes of the shipped adapters of MiniLM: 12 modules of 384 x 384, K = 32, r = 8, and a head of 6 labels.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from layer import random_subspace
from timing import environment
from torch import nn

from eigenpeft import AdapterBank, AdapterStore
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.subspace.stores.store_files import write_store

RESULTS = Path(__file__).parent / "results"
MODULES = {
    f"bert.encoder.layer.{layer}.attention.self.{name}": (384, 384) for layer in range(6) for name in ("query", "value")
}
K, R, LABELS = 32, 8, 6
N_DISTINCT = 200  # members of a large store repeat after so many


def member(seed):
    """A member of random numbers that its seed gives again."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    cores = {
        module: Core("low_rank", {"coefficients_in": normal(R, K), "coefficients_out": normal(K, R)}, 2.0)
        for module in MODULES
    }
    kept = {
        "base_model.model.classifier.weight": normal(LABELS, 384),
        "base_model.model.classifier.bias": normal(LABELS),
    }
    config = {"peft_type": "EIGENLORA", "core": "low_rank", "r": R, "lora_alpha": 16, "modules_to_save": ["classifier"]}
    record = {"source": f"member-{seed}", "task_type": "SEQ_CLS", "license": "mit", "config": config}
    return AdapterMember(cores, record=record, kept_aside=kept)


made = [member(10**6 + number) for number in range(30)]


def milliseconds(call, n):
    """Median and largest wall time of n calls, and the median of the CPU time that the calling thread spent."""
    wall, cpu = [], []
    for number in range(n):
        start, start_cpu = time.perf_counter(), time.thread_time()
        call(number)
        wall.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.thread_time() - start_cpu))
    return {"wall": statistics.median(wall), "largest_wall": max(wall), "cpu": statistics.median(cpu)}


def costs(folder, size):
    """A store of one size: what it costs to open it, to read a member, to add one."""
    subspace = random_subspace(MODULES, K)
    data = [member(seed).to_bytes() for seed in range(min(size, N_DISTINCT))]
    records = ((f"member-{number}", data[number % N_DISTINCT]) for number in range(size))
    write_store(folder, subspace, records, card="A benchmark.\n")
    store, generator = AdapterStore.from_pretrained(folder), random.Random(0)
    names = [f"member-{generator.randrange(size)}" for _ in range(100)]
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {
        "members": size,
        "open": milliseconds(lambda number: AdapterStore.from_pretrained(folder), 7),
        "read": milliseconds(lambda number: store[names[number]], 100),
        "add": milliseconds(lambda number: store.add(made[number], name=f"x-{number}"), 30),
    }
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - before
    row["bytes_written_over_member"] = written / 30 / made[0].n_bytes
    for number in range(30):
        store.remove(f"x-{number}")
    start = time.process_time()
    store.compact()
    row["compact_cpu_seconds"] = time.process_time() - start
    print(row, flush=True)
    return store, row


def kill(folder, n_kills, *, earlier):
    """kill -9 at random moments of `add` and `compact`: what is there afterwards, member by member."""
    generator, added, counts = random.Random(1), 0, {"add": 0, "compact": 0}
    for number in range(n_kills):
        what = ("add", "compact")[number % 2]
        child = os.fork()
        if child == 0:
            store = AdapterStore.from_pretrained(folder)
            for seed in range(added, 10**9):
                store.add(member(seed), name=f"new-{seed}")
                if what == "compact":
                    store.compact()
        time.sleep(generator.uniform(0.1, 1.0 if what == "add" else 5.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = AdapterStore.from_pretrained(folder)
        new = [name for name in store.names if name.startswith("new-")]
        assert new == [f"new-{i}" for i in range(len(new))], "an added member is gone"
        assert len(new) >= added, "an added member is gone"
        assert len(store) - len(new) == earlier, "an earlier member is gone"
        is_last = number == n_kills - 1
        sample = store.names if is_last else [f"member-{generator.randrange(earlier)}" for _ in range(50)]
        for name in dict.fromkeys([*sample, *new[-20:]]):
            kind, _, seed = name.partition("-")
            own, expected = store[name], member(int(seed) % N_DISTINCT if kind == "member" else int(seed))
            for module, core in own.items():
                for part, tensor in core.parts.items():
                    assert torch.equal(tensor, expected[module].parts[part]), f"{name} was damaged"
            assert all(torch.equal(tensor, expected.kept_aside[key]) for key, tensor in own.kept_aside.items())
        counts[what] += 1
        added = len(new)
    return {"kills": counts, "members_added_meanwhile": added, "earlier_members_intact": earlier, "members_lost": 0}


def changing_bank(store, n_members, n_checks):
    """Adds and removes in a bank while another thread serves; every served row is checked."""
    bank = AdapterBank.from_store(store, names=store.names[:n_members])
    module = next(iter(MODULES))
    model = nn.Sequential()
    for other in MODULES:
        parent = model
        for part in other.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Sequential())
            parent = parent.get_submodule(part)
        parent.add_module(other.rpartition(".")[2], nn.Linear(384, 384, bias=False))
    layer, bases = model.get_submodule(module), store.subspace[module]
    x = torch.randn(1, 1, 384)
    names = [f"member-{number}" for number in range(0, n_members, n_members // 64)]
    with torch.no_grad():
        base, projected = layer(x)[0], x[0] @ bases.components_in.mT
        expected = {name: base + projected @ store[name][module].dense().mT @ bases.components_out for name in names}
    stop, wrong, checked = threading.Event(), [], [0]
    generator = random.Random(2)

    def serve():
        with torch.no_grad():
            while not stop.is_set() or checked[0] < n_checks:
                rows = [generator.choice(names) for _ in range(8)]
                with bank.use(rows):
                    served = layer(x.expand(8, 1, 384))
                for row, name in enumerate(rows):
                    checked[0] += 1
                    if not torch.allclose(served[row], expected[name], atol=1e-3, rtol=1e-3):
                        wrong.append(name)

    with bank.attached(model):
        alone = {
            "add": milliseconds(lambda number: bank.add(made[number], name=f"guest-{number}"), 30),
            "remove": milliseconds(lambda number: bank.remove(f"guest-{number}"), 30),
        }
        thread = threading.Thread(target=serve)
        thread.start()
        meanwhile = {
            "add": milliseconds(lambda number: bank.add(made[number % 30], name=f"guest-{number}"), 200),
            "remove": milliseconds(lambda number: bank.remove(f"guest-{number}"), 200),
        }
        stop.set()
        thread.join()
    return {
        "members": n_members,
        "alone": alone,
        "while_another_thread_serves": meanwhile,
        "rows_checked": checked[0],
        "wrong_rows": len(wrong),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 members and 10 kills")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    sizes, n_kills = ([100, 1000], 10) if arguments.quick else ([100, 1000, 10_000], 50)
    shapes = {"modules": len(MODULES), "K": K, "r": R, "labels": LABELS, "member_bytes": made[0].n_bytes}
    load = f"load average {os.getloadavg()[0]:.1f} at the start, on {os.cpu_count()} cores"
    record = {"environment": environment(), "note": load, "shapes": shapes, "stores": []}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = Path(scratch) / f"store-{size}"
            store, row = costs(folder, size)
            record["stores"].append(row)
        record["bank"] = changing_bank(store, min(5000, sizes[-1]), 10_000)
        print(record["bank"], flush=True)
        record["killed"] = kill(folder, n_kills, earlier=sizes[-1])
        print(record["killed"], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "store.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
