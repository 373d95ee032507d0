"""Mutated files of every kind that eigenpeft reads: python -m tests.faults.fuzz --count 2000; only our own errors may come."""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eigenpeft.artifacts import reading
from eigenpeft.building import SubspaceBuilder
from eigenpeft.cli.training.comparisons import read_comparisons
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import EigenPeftError
from eigenpeft.reward import LowRankRewardModel
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.tuners import EigenLoraConfig, MosLoraConfig
from eigenpeft.tuners.files.reference_checkpoints import convert_reference_checkpoint
from tests.factories import random_factors, write_adapter

MODULES = {"layer.0.q": (6, 5), "layer.0.v": (4, 5)}
# What somebody could put into the place of any value.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 10**9, 10**30, -(2**63), 10**400, 0.0, -0.5, 1e-300, 1e30, 1e308, float("inf"), float("nan"),
    "", "0", "nan", "x" * 3_000, "a\0b", "\x1b[31m", "\ud800", "..", "/dev/zero", "x/..", "[/red]", "<b>`|\n", "(a+)+$", "(" * 50,
    "((a{99}){99}){99}", [], [[]], [1, 2], {}, {"a": {}}, {"": 0}, "F32", "BF16", "I64", [0, 0], [2**40, 2**40], "LORA",
    "EIGENLORA",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file that is mutated, and what reads it.

    Attributes:
        path: The file.
        read: Everything that a user would do with it.
        form: "json", "safetensors", "lines" or "bytes": how it is taken apart.
        weight: How often it is chosen.
    """

    path: Path
    read: Callable[[], object]
    form: str
    weight: int = 10


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed, inserted or repeated; or the file cut, or another one in its place."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place, kind = rng.randrange(max(len(content), 1)), rng.random()
        if kind < 0.45 and content:
            content[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind < 0.6:
            del content[place : place + rng.randrange(1, 64)]
        elif kind < 0.75:
            content[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind < 0.85:
            content[place:place] = content[place : place + rng.randrange(1, 256)]
        elif kind < 0.95:
            del content[place:]
        else:
            content = bytearray(
                rng.choice([b"", b"PK\x03\x04", b"version https://git-lfs", b"<!doctype html>", rng.randbytes(99)])
            )
    return bytes(content)


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        changed, key = dict(value), rng.choice(list(value))
        kind = rng.random()
        if kind < 0.7:
            changed[key] = mutated_value(value[key], rng)
        elif kind < 0.8:
            del changed[key]
        elif kind < 0.9:
            changed[rng.choice(["", "x" * 2_000, "a\0b", "use_new", "__metadata__", key + "2"])] = rng.choice(VALUES)
        else:
            changed[str(rng.choice(VALUES))[:99]] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed, place = list(value), rng.randrange(len(value))
        changed[place] = mutated_value(value[place], rng)
        return changed if rng.random() < 0.8 else changed[:place] + changed * rng.randrange(3)
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 2, 256, 2**31, 2**62])
    return copy.deepcopy(rng.choice(VALUES))


def encoded(value: Any, rng: random.Random) -> bytes:
    """JSON text; now and then nested deeper than a parser goes."""
    text = json.dumps(value)
    if rng.random() < 0.02:
        text = text[:-1] + ', "deep": ' + "[" * 50_000 + "}"
    return text.encode()


def mutated(data: bytes, form: str, rng: random.Random) -> bytes:
    """A file of a form, mutated within that form or as mere bytes."""
    if form == "bytes" or rng.random() < 0.3:
        return mutated_bytes(data, rng)
    if form == "json":
        return encoded(mutated_value(json.loads(data), rng), rng)
    if form == "lines":
        lines = data.splitlines()
        place = rng.randrange(len(lines))
        lines[place] = encoded(mutated_value(json.loads(lines[place]), rng), rng)
        return b"\n".join(lines)
    size = int.from_bytes(data[:8], "little")
    header = encoded(mutated_value(json.loads(data[8 : 8 + size]), rng), rng)
    length = (
        len(header) if rng.random() < 0.9 else rng.choice([0, 2**31, 2**63 - 1, len(header) + rng.randrange(-9, 9)])
    )
    return max(length, 0).to_bytes(8, "little") + header + data[8 + size :]


def targets(folder: Path) -> list[Target]:
    """One of each artifact, made small, and its files."""
    adapters = [
        write_adapter(folder / "adapters" / f"a{i}", random_factors(seed=i, modules=MODULES, rank=2), as_bin=i == 1)
        for i in range(3)
    ]
    (adapters[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    collection = AdapterCollection.from_pretrained(folder / "adapters")
    subspace = SubspaceBuilder(3).fit(collection).subspace_
    subspace.save_pretrained(folder / "subspace")
    AdapterStore.from_collection(subspace, collection).save_pretrained(folder / "store")
    reward = _reward_model()
    reward.save_pretrained(folder / "reward")
    rows = folder / "rows" / "comparisons.jsonl"
    rows.parent.mkdir()
    rows.write_text(
        "\n".join(json.dumps({"user": f"u{i}", "chosen": [0.5, i], "rejected": [1.0, 0.0]}) for i in range(4))
    )
    reference = _reference_checkpoint(folder / "reference")
    for kind, name in ((EigenLoraConfig(subspace=subspace), "eigen"), (MosLoraConfig(target_modules=["q"]), "mos")):
        kind.save_pretrained(str(folder / name))

    def collect() -> None:
        with AdapterCollection.from_pretrained(folder / "adapters") as opened:
            opened.diagnose(progress=False)
            [adapter.record() for adapter in opened.adapters]

    def store() -> None:
        opened = AdapterStore.from_pretrained(folder / "store")
        [(opened.member(name), [opened.factors(name, module=module) for module in opened.subspace]) for name in opened]
        opened.card()

    def rewarding() -> None:
        model = LowRankRewardModel.from_pretrained(folder / "reward", load_backbone=False)
        users = list(model.users)
        model.user_weights(users + ["unknown"], unknown="population")
        [model.users.n_pairs(user) for user in users]
        model.card()

    def bases() -> None:
        opened = PrincipalSubspace.from_pretrained(folder / "subspace")
        opened.card()
        opened.truncate(1)

    def convert() -> None:
        with tempfile.TemporaryDirectory() as out:
            convert_reference_checkpoint(reference, Path(out) / "plain")

    found = [
        Target(adapters[0] / "adapter_config.json", collect, "json", 30),
        Target(adapters[0] / "adapter_model.safetensors", collect, "safetensors", 30),
        Target(adapters[1] / "adapter_model.bin", collect, "bytes", 20),
        Target(adapters[0] / "README.md", collect, "bytes", 2),
        Target(folder / "subspace" / "subspace_config.json", bases, "json", 12),
        Target(folder / "subspace" / "subspace.safetensors", bases, "safetensors", 12),
        Target(reference / "adapter_config.json", convert, "json", 5),
        Target(reference / "adapter_model.safetensors", convert, "safetensors", 5),
        Target(rows, lambda: read_comparisons(rows, user_column="user", cache=None), "lines", 8),
        Target(
            folder / "eigen" / "adapter_config.json", lambda: _config(folder / "eigen", EigenLoraConfig), "json", 12
        ),
        Target(folder / "mos" / "adapter_config.json", lambda: _config(folder / "mos", MosLoraConfig), "json", 6),
    ]
    forms = {".json": "json", ".safetensors": "safetensors"}
    for name, read in (("store", store), ("reward", rewarding)):
        files = [path for path in sorted((folder / name).rglob("*")) if path.is_file() and path.name != "README.md"]
        found += [Target(path, read, forms.get(path.suffix, "bytes"), max(40 // len(files), 4)) for path in files]
    return found


# Fields of the configurations that are ours; what PEFT makes of its own fields is PEFT's.
_OURS = frozenset(
    {"subspace", "subspace_revision", "subspace_sha256", "n_components", "core", "init_from", "save_subspace", "r"}
    | {"embedded_n_components", "init_mixer", "train_mixer", "fold"}
)


def _config(folder: Path, kind: type) -> None:
    """A configuration from its file, as PEFT makes it, with the values of our own fields."""
    try:
        values = reading.read_json(folder / "adapter_config.json")
    except ValueError:
        return  # PEFT reads this file, not we
    if isinstance(values, dict):
        kind(peft_type="FROM A FILE", **{name: value for name, value in values.items() if name in _OURS})


def _reward_model() -> LowRankRewardModel:
    torch.manual_seed(0)
    model = LowRankRewardModel(torch.randn(2, 4), concentration=torch.ones(2))
    for user in ("anna", "ben", "7"):
        model.add_user(user, chosen=torch.randn(3, 4), rejected=torch.randn(3, 4))
    return model


def _reference_checkpoint(folder: Path) -> Path:
    pairs = random_factors(modules=MODULES, rank=2)
    write_adapter(folder, pairs)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_use_mixer": True}))
    tensors = load_file(folder / "adapter_model.safetensors")
    mixers = {f"base_model.model.{name}.lora_AB.weight": torch.eye(2) for name in pairs}
    save_file(tensors | mixers, folder / "adapter_model.safetensors")
    return folder


class Hang(BaseException):
    """A reader took longer than any machine is slow."""


def _alarm(*_: object) -> None:
    raise Hang


def run(count: int, seed: int, *, seconds: int) -> dict[str, Any]:
    """Mutate and read `count` files; what came of each, the failures, and the memory beyond the start.

    Args:
        count: How many.
        seed: Of the mutations; mutation number i of a seed is always the same.
        seconds: Time that one may take.
    """
    failures: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        places = targets(Path(scratch))
        for (
            place
        ) in places:  # everything is imported and warm before memory is measured, and every reader accepts its file
            place.read()
        start, began = _peak_megabytes(), time.monotonic()
        signal.signal(signal.SIGALRM, _alarm)
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            target = rng.choices(places, weights=[place.weight for place in places])[0]
            original = target.path.read_bytes()
            data = mutated(original, target.form, rng)
            target.path.write_bytes(data)
            signal.alarm(seconds)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    target.read()
                outcomes["read"] += 1
            except EigenPeftError:
                outcomes["refused"] += 1
            except (Exception, Hang) as error:
                signal.alarm(0)
                outcomes["failed"] += 1
                lines = traceback.format_exception(error)[-4:]
                name = str(target.path.relative_to(scratch))
                failures.append(
                    {"number": number, "file": name, "data": repr(data[:400]), "error": "".join(lines)[-900:]}
                )
            finally:
                signal.alarm(0)
                target.path.unlink(missing_ok=True)
                target.path.write_bytes(original)
        took = time.monotonic() - began
        for place in places:  # nothing that was read has changed anything
            place.read()
    megabytes = _peak_megabytes() - start
    return {
        "count": count,
        "seed": seed,
        "seconds": round(took, 1),
        "megabytes": round(megabytes),
        **outcomes,
        "failures": failures,
    }


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Print the result as JSON; exit code 1 if anything but our own errors came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120, help="time that one file may take")
    arguments = parser.parse_args()
    faulthandler.enable()  # a signal such as SIGBUS ends the process; say where
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = run(arguments.count, arguments.seed, seconds=arguments.seconds)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
