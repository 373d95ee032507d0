"""kill -9 at random moments while commands write: the old or the new artifact is whole, and the same command finishes the job.

Run it longer: `python -m tests.faults.kill --n 200`. Commands run in forked children, so that a kill takes no start of Python.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from eigenpeft import AdapterCollection, LowRankRewardModel, SubspaceBuilder
from eigenpeft.artifacts.manifest import MANIFEST
from eigenpeft.cli import main
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners import export_lora
from tests.factories import make_collection

Contents = dict[str, str]  # SHA-256 by name


@dataclass(frozen=True)
class Job:
    """A command that writes `out`; `old` puts what was there before, which commands that change an artifact need."""

    words: tuple[str, ...]
    out: Path
    old: Callable[[], None]
    read: Callable[[Path], Contents] | None = None
    changes: bool = False

    def state(self) -> Contents:
        """What is there, to compare."""
        return in_child(lambda: (self.read or contents)(self.out))


def contents(folder: Path) -> Contents:
    """Hash of every file below a folder, by path; empty where there is none."""
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def without_manifest(state: Contents) -> Contents:
    """A state without its manifest, which has both hashes of a file while that file is changed in place."""
    return {name: sha256 for name, sha256 in state.items() if name != MANIFEST}


def digest(data: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def in_child(work: Callable[[], Contents | None]) -> Contents:
    """What a function returns in a forked child: the state of this process, from which commands are forked, stays as it is."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(work() or {}, pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "not readable as a whole artifact"
    return json.loads(text)


def beside_of(folder: Path) -> set[str]:
    """Names of what lies in a folder."""
    return {path.name for path in folder.iterdir()}


def members(folder: Path) -> Contents:
    """Hashes of the bases and of every member of a store, whose shards have random names; empty where there is none."""
    if not folder.exists():
        return {}
    store = AdapterStore.from_pretrained(folder)
    return {"bases": store.subspace.fingerprint, **{name: digest(store._records.read(name)) for name in store.names}}


def start(words: tuple[str, ...]) -> int:
    """Run a command in a forked child and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.argv = ["eigenpeft", *words]
        main()
        os._exit(0)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    finally:
        os._exit(70)


def finish(words: tuple[str, ...]) -> int:
    """Run a command in a forked child and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(words), 0)[1])


def jobs(place: Path) -> dict[str, Job]:
    """One job per command, each over an older artifact of its kind."""
    adapters = make_collection(place / "adapters", rank=(2, 4), n_shared=6, noise=0.05).folder
    with AdapterCollection.from_pretrained(adapters) as collection:
        old, new = (SubspaceBuilder(k).fit(collection).subspace_ for k in (3, 4))
        new.save_pretrained(place / "bases")
        old_store, new_store = (AdapterStore.from_collection(bases, collection) for bases in (old, new))
    new_store.save_pretrained(place / "whole-store")
    opened = AdapterStore.from_pretrained(place / "whole-store")
    kept = {name: old_store[name] for name in old_store.names[:4]}
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    torch.manual_seed(0)
    backbone = BertForSequenceClassification(config)
    LowRankRewardModel(torch.eye(3, 16), backbone=backbone).save_pretrained(place / "rewards")
    older = LowRankRewardModel(2 * torch.eye(3, 16), backbone=backbone)
    (place / "rows.jsonl").write_text(
        "".join(
            f'{{"user_id": "u{i % 4}", "chosen": [{i % 3}, 1.0, {i % 5}], "rejected": [0.0, {i % 2}, 0.5]}}\n'
            for i in range(40)
        )
    )
    backbone.save_pretrained(place / "base")
    tuned = get_peft_model(
        BertForSequenceClassification.from_pretrained(place / "base"),
        LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
    )
    tuned.save_pretrained(place / "tuned")
    out = {
        name: place / "out" / name
        for name in ("sub", "store", "lora", "classifier", "fitted", "merged", "users", "grown", "wider")
    }

    def put_classifier() -> None:
        older.save_pretrained(place / "out" / "older")
        finish(("lore", "export", str(place / "out" / "older"), "-o", str(out["classifier"])))

    def put_fitted() -> None:
        LowRankRewardModel(torch.eye(2, 3)).save_pretrained(out["fitted"])

    def put_users() -> None:
        LowRankRewardModel(torch.eye(2, 3)).save_pretrained(out["users"])

    def put_grown() -> None:
        AdapterStore(new, members={name: opened[name] for name in opened.names[:3]}).save_pretrained(out["grown"])

    def put_wider() -> None:
        AdapterStore(old, members=dict(kept)).save_pretrained(out["wider"])

    def put_merged() -> None:
        finish(("merge-base", str(place / "tuned"), "--model", str(place / "base"), "-o", str(out["merged"])))

    def words(*parts: object) -> tuple[str, ...]:
        return (*map(str, parts), "--overwrite")

    return {
        "build": Job(
            words("build", adapters, "-k", 4, "-o", out["sub"]), out["sub"], lambda: old.save_pretrained(out["sub"])
        ),
        "project": Job(
            words("project", place / "bases", adapters, "-o", out["store"]),
            out["store"],
            lambda: old_store.save_pretrained(out["store"]),
            read=members,
        ),
        "export": Job(
            words("export", place / "whole-store", "adapter-1", "-o", out["lora"]),
            out["lora"],
            lambda: export_lora(opened, out["lora"], adapter_name="adapter-2"),
        ),
        "lore export": Job(
            words("lore", "export", place / "rewards", "-o", out["classifier"]), out["classifier"], put_classifier
        ),
        "lore fit": Job(
            words("lore", "fit", place / "rows.jsonl", "--n-basis", 2, "-o", out["fitted"]), out["fitted"], put_fitted
        ),
        "lore add-user": Job(
            ("lore", "add-user", str(out["users"]), "u1", str(place / "rows.jsonl")),
            out["users"],
            put_users,
            changes=True,
        ),
        "store add": Job(
            ("store", "add", str(out["grown"]), str(adapters / "adapter-4"), "--replace"),
            out["grown"],
            put_grown,
            read=members,
            changes=True,
        ),
        "store absorb": Job(
            ("store", "absorb", str(out["wider"]), str(adapters / "adapter-4"), "--held-share", "1.0", "--replace"),
            out["wider"],
            put_wider,
            read=members,
            changes=True,
        ),
        "merge-base": Job(
            words("merge-base", place / "tuned", "--model", place / "base", "-o", out["merged"]),
            out["merged"],
            put_merged,
        ),
    }


def kill_at_random(n: int, *, seed: int, names: tuple[str, ...] = ()) -> Counter[str]:
    """Kill `n` times and check each time.

    Args:
        n: Number of kills.
        seed: Seed of the moments.
        names: Jobs; all by default.

    Returns:
        How often the old artifact, the new one or none was there after the kill.

    Raises:
        AssertionError: If something else was there, the command did not finish the job, or something was left beside it.
    """
    draw, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        chosen = {name: job for name, job in jobs(place).items() if not names or name in names}
        for name, job in chosen.items():
            clear(place / "out")
            if job.changes:
                job.old()
            began = time.monotonic()
            assert finish(job.words) == 0, name
            length, new = time.monotonic() - began, job.state()
            for _ in range(-(-n // len(chosen))):
                with_old = job.changes or draw.random() < 0.8
                clear(place / "out")
                if with_old:
                    in_child(job.old)
                old, beside = job.state(), beside_of(place / "out")
                child = start(job.words)
                time.sleep(draw.uniform(0.0, 1.05 * length))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                settled = without_manifest if job.changes else dict
                there = settled(job.state())
                assert there in (settled(old), settled(new)), (
                    f"{name}: {sorted(there)} is neither the old nor the new artifact"
                )
                found["new" if there == settled(new) else "old" if there else "none"] += 1
                assert finish(job.words) == 0, f"{name}: the same command does not finish the job"
                assert job.state() == new, f"{name}: other bytes than of an undisturbed run"
                left = beside_of(place / "out") - beside - {job.out.name}
                assert not left, f"{name}: left beside it: {sorted(left)}"
    return found


def clear(folder: Path) -> None:
    """Empty the folder of outputs; everything in it was made here."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", default=())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(dict(kill_at_random(arguments.n, seed=arguments.seed, names=tuple(arguments.jobs))))
