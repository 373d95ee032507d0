"""LoRe on simulated users in large: 100,000 comparisons of 4,096 features, and 2 million in memory-mapped files.

Command:  python benchmarks/lore_large.py large mapped   (either)
Hardware: CPU, one thread; large 10 min of CPU and 9 GB of memory, mapped 5 min and 9 GB of disk (`--scratch`).
Writes:   entries "large" and "mapped" of benchmarks/results/lore_simulated.json, and lines on stdout.

Users, settings and the published procedure as in lore_simulated.py. Times are CPU seconds of this process. `mapped` under a limit
that counts the pages of its files too (Linux, as root): a control group of 6 GB for this shell and what it starts,

    mkdir /sys/fs/cgroup/memory/six && echo 6000000000 > /sys/fs/cgroup/memory/six/memory.limit_in_bytes
    echo $$ > /sys/fs/cgroup/memory/six/cgroup.procs
"""

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from lore_simulated import FIXED, Setting, published_fit, read_results, write_results

from eigenpeft.reward import LoReFitter
from eigenpeft.reward.evaluation.simulation import SimulatedUsers


def large():
    """1,000 users x 100 comparisons x 4,096 features; signal in leading directions, and in all of them.

    Rows that the results hold already are kept: remove one to have it measured again.
    """
    result = read_results().get("large", {})
    fits = {
        "LoRe, ours, B = 5, 256 directions": {"n_components": 256},
        "LoRe, ours, B = 5, 512 directions": {"n_components": 512},
        "one shared head (B = 1), all features": {"n_basis": 1},
        "LoRe, ours, B = 5, all features": {"max_iter": 300},
        "LoRe, ours, B = 1 or 5 by held-out comparisons, all features": {"n_basis": (1, 5)},
    }
    for name, n_signal in (("signal in 64 leading directions", 64), ("signal in all directions", 4096)):
        rows = result.setdefault(name, {})
        missing = [label for label in (*fits, "LoRe, published procedure") if label not in rows]
        if not missing:
            continue
        setting = Setting(1000, 100, 4096, n_new=200, n_test=10, n_signal=n_signal)
        rows |= setting.bounds()
        for label in missing:
            if label in fits:
                _, rows[label] = setting.fit(**{"n_basis": 5, **FIXED, **fits[label]})
            else:
                steps, start = 5, time.process_time()
                published_fit(setting.train, setting.train_rows, 1000, 5, steps=steps, seed=0)
                rows[label] = {"cpu_seconds_a_step_of_1000": round((time.process_time() - start) / steps, 3)}
            print(name, label, rows[label], flush=True)
            write_results(read_results() | {"large": result})
        print(name, rows["reference head"], rows["oracle"])
        del setting
    return result


def memory_limit():
    """Gigabytes that the control group of this process allows it, files' pages included; None where there is no limit."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for path in (
        f"/sys/fs/cgroup/memory{groups.get('memory', '')}/memory.limit_in_bytes",
        f"/sys/fs/cgroup{groups.get('', '')}/memory.max",
    ):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        if text != "max" and int(text) < 2**60:
            return round(int(text) / 1e9, 2)
    return None


class OwnMemory:
    """Peak of what the process holds itself (Linux), looked at ten times a second; pages of mapped files are not in it."""

    def __enter__(self):
        self.peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, kilobytes / 1e6)


def mapped(scratch):
    """100,000 users x 20 comparisons x 1,024 features, texts from a pool of 65,536, in files read in parts."""
    n_users, n_pairs, width, n_texts = 100_000, 20, 1024, 65_536
    users = SimulatedUsers(n_users, n_features=width, n_basis=5, margin_scale=10.0, shared=0.5, reference_noise=0.3)
    pool = users.pairs(n_texts, seed=0, users=range(1)).chosen  # texts that a user preferred: a little one-sided
    rewards = pool @ users.reward_basis.T
    generator = torch.Generator().manual_seed(1)

    def comparisons(rows):
        texts = torch.randint(n_texts, (2, len(rows)), generator=generator)
        margins = ((rewards[texts[0]] - rewards[texts[1]]) * users.user_weights[rows]).sum(dim=1)
        swap = torch.rand(len(rows), generator=generator) > torch.sigmoid(margins)
        return torch.where(swap, texts.flip(0), texts), torch.where(swap, -margins, margins)

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shape = (n_users * n_pairs, width)
        sides = [
            np.lib.format.open_memmap(Path(folder) / f"{side}.npy", mode="w+", dtype=np.float16, shape=shape)
            for side in ("chosen", "rejected")
        ]
        everybody = torch.arange(n_users).repeat_interleave(n_pairs)
        half = pool.half()
        for start in range(0, len(everybody), 20_000):
            texts, _ = comparisons(everybody[start : start + 20_000])
            for side, numbers in zip(sides, texts, strict=True):
                side[start : start + 20_000] = half[numbers].numpy()
        del sides, half
        sides = [np.load(Path(folder) / f"{side}.npy", mmap_mode="r") for side in ("chosen", "rejected")]
        start = time.process_time()
        fitter = LoReFitter(n_basis=5, n_components=128, max_iter=30, **FIXED)
        with OwnMemory() as memory:
            fitter.fit(*sides, user_ids=everybody.tolist(), reference_head=users.reference_head)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows = torch.arange(2000).repeat_interleave(20)
    texts, truth = comparisons(rows)
    differences = pool[texts[0]] - pool[texts[1]]
    model = fitter.model_

    def share(margins):
        return round((margins > 0).float().mean().item(), 4)

    result = {
        "cpu_seconds": round(seconds, 1),
        "gigabytes_of_features": round(2 * 2 * n_users * n_pairs * width / 1e9, 1),
        "peak_gigabytes_of_memory_mapped_file_pages_included": round(peak, 2),
        "peak_gigabytes_of_own_memory": round(memory.peak, 2),
        "limit_in_gigabytes_files_pages_included": memory_limit(),
        "converged": model.info["converged"],
        "seen_users_new_comparisons": share(
            (model.basis_rewards(differences) * model.user_weights(rows.tolist())).sum(1)
        ),
        "shared_population": share(model.rewards(differences)),
        "reference": share(differences @ users.reference_head),
        "oracle": share(truth),
    }
    print(result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=("large", "mapped"))
    parser.add_argument("--scratch", type=Path, help="folder for the files of `mapped`; the system's own by default")
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    for name in arguments.parts:
        found = large() if name == "large" else mapped(arguments.scratch)
        write_results(read_results() | {name: found})


if __name__ == "__main__":
    main()
