"""The command merge: any folder of LoRA adapters to one plain LoRA."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from eigenpeft.artifacts.atomic import check_output
from eigenpeft.cli.app import AllowDifferentBaseModels, Json, Out, app, console, join_team, print_json, quiet
from eigenpeft.cli.rows import check_there, open_rows, open_tokenizer, without_load_reports
from eigenpeft.cli.tasks import load_task
from eigenpeft.combining import MergedAdapter, load_statistics, merge
from eigenpeft.combining.recipe import MergeRecipe, read_recipe
from eigenpeft.combining.scoring import HeldOutTask, held_out_score
from eigenpeft.combining.sources import open_sources
from eigenpeft.errors import EigenPeftError
from eigenpeft.linalg.merging import RULES
from eigenpeft.report.markup import escape
from eigenpeft.report.merge_tables import grid_table, merge_table
from eigenpeft.tuners.files.lora_files import KIND

_BATCH = 32
_MAX_LENGTH = 512


SomeAdapters = Annotated[
    list[str] | None,
    typer.Argument(help="Adapter folders, folders of adapter folders, or Hub ids, in any mix; none with --recipe."),
]
Rank = Annotated[int | None, typer.Option(help="Rank of every module; default: what is needed to lose nothing.")]
Weight = Annotated[
    list[str] | None, typer.Option(help="NAME=NUMBER, once for each adapter that does not have the weight 1.")
]
Scale = Annotated[
    str | None,
    typer.Option(help="Final multiplier: a number, auto, or several with commas to choose by --dataset."),
]
Dataset = Annotated[
    list[str] | None,
    typer.Option(help="Held-out rows to choose the scale by: FILE for a language model, TASK=FILE for a classifier."),
]
Model = Annotated[str | None, typer.Option(help="Base model for --dataset; default: the one the adapters name.")]
Metric = Annotated[str | None, typer.Option(help="accuracy or loss; default: accuracy where rows have labels.")]
WorkDir = Annotated[
    Path | None, typer.Option(help="Folder for finished modules, to go on after an interruption or under torchrun.")
]
OverwriteAdapter = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that eigenpeft wrote there.")]


@app.command("merge")
def merge_command(
    out: Out,
    adapters: SomeAdapters = None,
    rule: Annotated[str | None, typer.Option(help=f"One of {', '.join(RULES)}; default: task_arithmetic.")] = None,
    rank: Rank = None,
    weight: Weight = None,
    scale: Scale = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the rule, such as density=0.2.")] = None,
    calibrate: Annotated[list[str] | None, typer.Option(help="pico (before) or svc (after) around any rule.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with adapters, weights and settings.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder that save_statistics wrote, for regmean.")] = None,
    dataset: Dataset = None,
    model: Model = None,
    metric: Metric = None,
    n_rows: Annotated[int, typer.Option(help="Rows of each dataset to use.")] = 100,
    head: Annotated[str | None, typer.Option(help="Adapter whose head becomes the merged adapter's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws of dare.")] = 0,
    work_dir: WorkDir = None,
    overwrite: OverwriteAdapter = False,
    allow_different_base_models: AllowDifferentBaseModels = False,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters of one base model, whatever their ranks and alphas, into one plain LoRA.

    Example: eigenpeft merge adapters/ --rule tsv --rank 16 --out merged
    """
    quiet(as_json)
    team = join_team()
    written = _recipe(adapters, recipe)
    check_output(out, kind=KIND, overwrite=overwrite, inputs=written.adapters)
    given = {"rule": rule, "rank": rank, "calibrate": calibrate, "scale": _scale(scale)}
    arguments = _arguments(written, given, option, seed=seed)
    for text in dataset or ():
        check_there(text.rpartition("=")[2])  # before adapters are looked for on the Hub
    sources = open_sources(list(written.adapters), allow_different_base_models=allow_different_base_models)
    typed = {name: _number(value, f"--weight {name}") for name, value in _pairs(weight, "--weight").items()}
    score = None
    if dataset is not None:
        are_classifiers = sources.task_type == "SEQ_CLS"
        score = _score(
            dataset,
            base=model or sources.base_model,
            metric=metric,
            n_rows=n_rows,
            heads=sources.parts.heads,
            are_classifiers=are_classifiers,
        )
    merged = merge(
        list(written.adapters),
        weights=_weights(written, sources.names) | typed,
        score=score,
        statistics=None if statistics is None else load_statistics(statistics),
        work_dir=work_dir,
        allow_different_base_models=allow_different_base_models,
        progress=not as_json,
        **arguments,
    )
    if not team.is_main:
        return
    merged.save_pretrained(out, head=head, overwrite=overwrite, inputs=written.adapters)
    _show(merged, out, as_json=as_json)


def _show(merged: MergedAdapter, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(out), "heads": sorted(merged.heads), **merged.report.to_dict()})
        return
    if merged.report.grid:
        console.print(grid_table(merged.report))
    console.print(merge_table(merged.report))
    far = [source.name for source in merged.report.sources if source.weight > 0 and (source.relative_distance or 0) > 1]
    if far and merged.report.scale != "auto":
        console.print(
            f"From {len(far)} of {len(merged.report.sources)} sources the result is farther than the base model is: the multiplier "
            "matters as much as the rule. Try --scale auto, or several with --dataset."
        )
    beside = f", with {len(merged.heads)} heads in {escape(str(out / 'heads'))}" if merged.heads else ""
    console.print(f"Wrote the plain LoRA adapter {escape(str(out))}{beside}.")


def _recipe(adapters: list[str] | None, path: Path | None) -> MergeRecipe:
    if (path is None) == (not adapters):
        raise EigenPeftError("Name adapters, or a --recipe that lists them: one of the two.")
    return MergeRecipe(tuple(adapters or ()), ()) if path is None else read_recipe(path)


def _arguments(recipe: MergeRecipe, given: dict[str, Any], options: list[str] | None, *, seed: int) -> dict[str, Any]:
    """The rule and its options: what the recipe says, and in its place what is typed."""
    arguments: dict[str, Any] = {"rule": "task_arithmetic", "seed": seed, **recipe.settings, **recipe.options}
    arguments |= {name: value for name, value in given.items() if value is not None}
    return arguments | {name: yaml.safe_load(value) for name, value in _pairs(options, "--option").items()}


def _weights(recipe: MergeRecipe, names: Sequence[str]) -> dict[str, float]:
    """The recipe's weights by name; 1 for each adapter where it gives none."""
    if not recipe.weights:
        return dict.fromkeys(names, 1.0)
    if len(recipe.weights) != len(names):
        raise EigenPeftError(
            f"The recipe lists {len(recipe.weights)} adapters, in whose folders {len(names)} were found; name each."
        )
    return dict(zip(names, recipe.weights, strict=True))


def _scale(text: str | None) -> float | str | list[float] | None:
    if text is None or text == "auto":
        return text
    numbers = [_number(part, "--scale") for part in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _pairs(values: list[str] | None, flag: str) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or ()]
    wrong = [name for name, sign, _ in pairs if not sign or not name]
    if wrong:
        raise EigenPeftError(f"{flag} {wrong[0]!r} must be written NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise EigenPeftError(f"{flag} {text!r} must be a number.") from None


def _score(
    datasets: list[str], *, base: str | None, metric: str | None, n_rows: int, heads: Any, are_classifiers: bool
) -> Callable[[MergedAdapter], float]:
    """Held-out tasks as a score: classifiers get the head of the adapter they are named after."""
    if base is None:
        raise EigenPeftError("The adapters name no base model; pass --model for --dataset.")
    is_classifier = are_classifiers or bool(heads)
    tasks, labelled = [], False
    for text in datasets:
        name, sign, path = text.rpartition("=")
        if not sign:
            if is_classifier and not {"label", "messages", "completion"} & set(open_rows(Path(path)).column_names):
                raise EigenPeftError(
                    f"--dataset {path}: the adapters are classifiers, and the rows have no column 'label'. Call the column of "
                    f"their labels so, and write TASK={path}, where TASK is an adapter with a head (here {sorted(heads)})."
                )
            task = load_task(base, Path(path), n_rows=n_rows)
            batches = [task.data_collator(task.rows[i : i + _BATCH]) for i in range(0, len(task.rows), _BATCH)]
            tasks.append(HeldOutTask(path, task.model.eval(), batches))
            continue
        if name not in heads:
            raise EigenPeftError(
                f"--dataset {text}: {name!r} is not an adapter with a head; those are {sorted(heads)}."
            )
        labelled = True
        tasks.append(_classifier(name, path=Path(path), base=base, head=heads[name], n_rows=n_rows))
    return held_out_score(tasks, metric=metric or ("accuracy" if labelled else "loss"))


def _classifier(name: str, *, path: Path, base: str, head: Any, n_rows: int) -> HeldOutTask:
    rows: list[Any] = list(islice(iter(open_rows(path)), n_rows))
    n_labels = max(tensor.shape[0] for tensor in head.values())
    labels = [row.get("label") for row in rows]
    if not labels or not all(isinstance(label, int) and 0 <= label < n_labels for label in labels):
        raise EigenPeftError(
            f"{str(path)!r} must have a column label with whole numbers from 0 to {n_labels - 1}, the classes of the head of "
            f"{name!r}; it has {sorted(set(map(str, labels)))[:5]}."
        )
    tokenizer = open_tokenizer(base)
    collate = DataCollatorWithPadding(tokenizer)
    encoded = [
        {
            **tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=_MAX_LENGTH),
            "labels": row["label"],
        }
        for row in rows
    ]
    with without_load_reports():  # the head is put in place later
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_labels).eval()
    return HeldOutTask(name, model, [collate(encoded[i : i + _BATCH]) for i in range(0, len(encoded), _BATCH)])
