"""What an audit could know before training, for every zoo and every target of the study: the inputs of the calibration.

Command:   python benchmarks/regimes/measures.py --data DIR --work DIR   (after run.py)
Hardware:  CPU, one thread; some 10 s per zoo, some 2 s per target.
Writes:    WORK/measures.jsonl: of the adapters alone (kind "zoo"), and of a target's rows beside them (kind "target").
"""

import argparse
from functools import lru_cache
from pathlib import Path

import torch
import training
import zoos
from methods import subspace_of
from run import Study, append, quiet, read
from torch import Tensor

from eigenpeft.audit import audit_adapters
from eigenpeft.subspace import random_subspace

K = 8
# A head that fits every row leaves a gradient of noise; a lightly trained one points where the task is.
HEAD_RATE = 1e-2


def of_zoo(zoo: str, size: int, draw: int, work: Path) -> dict:
    """Held-out share and its chance at K = 8 and 32, and how alike the updates are."""
    report = audit_adapters(zoos.collection(zoo, size, draw, work), n_components=32, n_nulls=1, progress=False)
    found, n = zoos.factors(zoo, size, draw, work), len(report.adapters)
    mean = zoos.mean_update(zoo, size, draw, work)
    squares = {module: [float((b @ a).square().sum()) for _, b, a in parts] for module, parts in found.items()}
    agreement = [float(mean[m].square().sum()) / (sum(values) / len(values)) for m, values in squares.items()]
    return {
        "held_out_8": report.held_out.real[7],
        "chance_8": report.held_out.null[7],
        "held_out_32": report.held_out.real[31],
        "chance_32": report.held_out.null[31],
        "held_out_in_8": report.held_out_input.real[7],
        "agreement": sum(agreement) / len(agreement),
        "pair_cosine": (sum(map(sum, report.similarity)) - n) / (n * (n - 1)),
        "verdict": report.verdict,
    }


def gradients(study: Study, cell: dict) -> dict[str, Tensor]:
    """The gradient of the loss on a target's training rows by every adapted weight, behind a lightly trained head."""
    task = study.task(cell["target"], cell["rows"], cell["seed"])
    base = training.fresh_base(task.n_labels, seed=cell["seed"])
    n_layers = len(base.bert.encoder.layer)
    features = training.prefix(base.bert, task.ids, layer=n_layers).hidden
    head = training.train_head(features, task.labels, task.n_labels, rate=HEAD_RATE, steps=40, seed=cell["seed"])
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    weights = {
        f"bert.encoder.layer.{i}.attention.self.{name}": base.bert.encoder.layer[i]
        .attention.self.get_submodule(name)
        .weight
        for i in range(n_layers)
        for name in zoos.MODULES
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    fixed = training.prefix(base.bert, task.ids, layer=0)
    for start in range(0, len(task.ids), 16):
        chosen = list(range(start, min(start + 16, len(task.ids))))
        logits = head(training.forward(base.bert, fixed.batch(chosen, n_layers)).hidden)
        torch.nn.functional.cross_entropy(logits, task.labels[chosen], reduction="sum").backward()
    return {name: weight.grad for name, weight in weights.items()}


def share(gradient: dict[str, Tensor], bases: dict[str, tuple[Tensor, Tensor]]) -> float:
    inside = sum(float((bases[m][0] @ g @ bases[m][1].mT).square().sum()) for m, g in gradient.items())
    return inside / sum(float(g.square().sum()) for g in gradient.values())


@lru_cache(maxsize=4)
def bases_of(zoo: str, size: int, draw: int, work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found = subspace_of(zoo, size, draw, work, K)
    return {name: (each.components_out.float(), each.components_in.float()) for name, each in found.items()}


@lru_cache(maxsize=1)
def random_bases(work: Path) -> list[dict[str, tuple[Tensor, Tensor]]]:
    like = subspace_of("shipped", 10, 0, work, K)
    drawn = [random_subspace(like=like, seed=seed) for seed in range(5)]
    return [{m: (each.components_out.float(), each.components_in.float()) for m, each in one.items()} for one in drawn]


def of_target(gradient: dict[str, Tensor], zoo: tuple[str, int, int, Path]) -> dict:
    """Gradient share, how far the mean update and the best adapter point downhill (cosines with the negative gradient)."""
    mean, length = zoos.mean_update(*zoo), sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    downhill = -sum(float((gradient[m] * update).sum()) for m, update in mean.items())
    mean_length = sum(float(update.square().sum()) for update in mean.values()) ** 0.5
    found, cosines = zoos.factors(*zoo), {}
    for i, (name, _, _) in enumerate(next(iter(found.values()))):
        updates = {m: parts[i][1] @ parts[i][2] for m, parts in found.items()}
        size = sum(float(update.square().sum()) for update in updates.values()) ** 0.5
        cosines[name] = -sum(float((gradient[m] * update).sum()) for m, update in updates.items()) / (length * size)
    best = max(cosines, key=lambda name: cosines[name])
    return {
        "gradient_share": share(gradient, bases_of(*zoo)),
        "gradient_random": sum(share(gradient, each) for each in random_bases(zoo[3])) / 5,
        "mean_cosine": downhill / (length * mean_length),
        "best_adapter": best,
        "best_cosine": cosines[best],
        "cosines": {name: round(value, 5) for name, value in cosines.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    quiet()
    study, path = Study(given.data, given.work), given.work / "measures.jsonl"
    rows = read(path)
    tested = [row for row in study.rows if row["stage"] == "test"]
    found = [(row["zoo"], row["size"], row["draw"]) for row in tested if row["zoo"]]
    for zoo in dict.fromkeys(
        [*found, ("shipped", 10, 0)]
    ):  # the ten of the earlier study, whose cells calibrate.py reads
        asked = {"kind": "zoo", "zoo": zoo[0], "size": zoo[1], "draw": zoo[2]}
        if not any(asked.items() <= row.items() for row in rows):
            append(path, {**asked, **of_zoo(*zoo, given.work)})
    names = ("zoo", "size", "draw", "target", "rows", "seed")
    cells = {tuple(row[name] for name in names): row for row in tested if row["zoo"]}
    known = {tuple(row[name] for name in names) for row in rows if row["kind"] == "target"}
    cached = lru_cache(maxsize=64)(
        lambda target, n, seed: gradients(study, {"target": target, "rows": n, "seed": seed})
    )
    for key in cells:
        if key in known:
            continue
        gradient = cached(*key[3:])
        found = of_target(gradient, (*key[:3], given.work))
        append(path, {"kind": "target", **dict(zip(names, key, strict=True)), **found})


if __name__ == "__main__":
    main()
