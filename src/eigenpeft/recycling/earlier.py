"""What an earlier run left in the folder of the result: trials that count again, and a result that is not replaced unasked."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from eigenpeft.artifacts.atomic import atomic_file, check_output
from eigenpeft.artifacts.reading import read_json
from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import ArtifactError, EigenPeftError
from eigenpeft.recycling.report import RecycleReport, Trial
from eigenpeft.tuners.files.lora_files import KIND

ADAPTER, REPORT, SETTINGS, TRIALS = "adapter", "report.json", "settings.json", "trials.jsonl"


def settings_of(collection: AdapterCollection, rows: Any, args: TrainingArguments, **own: Any) -> dict[str, Any]:
    """What the trials of two runs must have in common to count for both.

    Args:
        collection: The adapters.
        rows: All rows, those that are held out too.
        args: Arguments of the trainer.
        **own: The search's own arguments that a trial depends on.

    Raises:
        CollectionError: If a file of an adapter cannot be read.
    """
    return {
        "adapters": {record["name"]: record["sha256"] for record in (each.record() for each in collection.adapters)},
        "rows": len(rows),
        "rows_sha256": _digest(rows),
        "batch_size": args.per_device_train_batch_size,
        "max_steps": args.max_steps,
        "seed": args.seed,
        **own,
    }


def _digest(rows: Any) -> str:
    """SHA-256 of the contents of all rows."""
    digest = hashlib.sha256()
    for number in range(len(rows)):
        digest.update(row_text(rows[number]).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def row_text(row: Any) -> str:
    """A row as text that is the same for the same contents.

    Args:
        row: A mapping of numbers, texts, lists or tensors.
    """
    return json.dumps(row, sort_keys=True, default=lambda value: getattr(value, "tolist", value.__repr__)())


def check_result(
    out: Path,
    *,
    learning_rates: Mapping[str, Sequence[float]],
    budget: float,
    inputs: Sequence[str | Path],
    overwrite: bool,
) -> None:
    """Refuse to replace a finished result by one that is chosen otherwise, before anything is trained.

    With the same candidates, rates and budget all trials of the earlier run count, so that the new choice rests on as much at
    least. With others it may rest on less.

    Args:
        out: Folder of the result.
        learning_rates: Candidates of this run, in order, and the rates tried for them.
        budget: Its budget.
        inputs: Folders that are read; names that are not local paths are passed over.
        overwrite: Whether a finished result may be replaced nevertheless.

    Raises:
        ArtifactError: If a result is there that this run must not replace, or something else is in its place.
    """
    is_finished = (out / REPORT).exists()
    check_output(out / ADAPTER, kind=KIND, overwrite=overwrite or is_finished, inputs=inputs)
    if overwrite or not is_finished:
        return
    try:
        before = RecycleReport.from_dict(read_json(out / REPORT))
    except (OSError, ValueError, TypeError, ArtifactError) as error:
        raise ArtifactError(
            f"{str(out / REPORT)!r} cannot be read ({error}), so that nothing says how the result beside it was chosen. "
            f"{_WAYS_OUT}"
        ) from error
    other = [] if before.budget == budget else [f"the budget {_shown(before.budget)} (now {budget:g})"]
    if before.candidates != tuple(learning_rates):
        other.append(f"the candidates {', '.join(before.candidates) or 'unknown'} (now {', '.join(learning_rates)})")
    elif before.learning_rates:  # older reports do not say them
        shown = [_rates(each) for each in (before.learning_rates, learning_rates)]
        if shown[0] != shown[1]:
            other.append(f"the learning rates {shown[0]} (now {shown[1]})")
    if other:
        raise ArtifactError(
            f"{str(out)!r} holds a finished result, {before.winner}, which was chosen with {' and '.join(other)}. {_WAYS_OUT}"
        )


_WAYS_OUT = (
    "Choose another out_dir (--out); or pass overwrite=True (--overwrite on the command line) to choose anew, where trials of "
    "the same settings count."
)


def _rates(learning_rates: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {' '.join(f'{rate:g}' for rate in rates)}" for name, rates in learning_rates.items())


def _shown(budget: float | None) -> str:
    return "unknown" if budget is None else f"{budget:g}"


def remembered(out: Path, settings: dict[str, Any], *, overwrite: bool) -> list[Trial]:
    """The trials of an earlier run with the same settings.

    Args:
        out: Folder of the result; it is made where there is none.
        settings: Settings of this run, from `settings_of`.
        overwrite: Whether trials of other settings are thrown away; otherwise they are refused.

    Raises:
        EigenPeftError: If the folder holds trials of other settings, or what cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, log = out / SETTINGS, out / TRIALS
    if not path.exists() and not log.exists():
        _write_settings(path, settings)
    try:
        known = read_json(path)
        if isinstance(known, dict) and "head_rate" in known:  # its name before 0.1.0
            known["head_learning_rate"] = known.pop("head_rate")
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        # A run that was stopped may have left a part of its last line.
        read = (Trial.from_dict(json.loads(line)) for line in lines if line.endswith("\n"))
        trials = [trial for trial in read if trial.losses]  # older versions kept no losses; those are trained again
        if lines and not lines[-1].endswith("\n"):  # the next trial starts on a line of its own
            with atomic_file(log, overwrite=True) as scratch:
                scratch.write_text("".join(lines[:-1]), encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise EigenPeftError(f"The trials in {str(out)!r} cannot be read ({error}); choose another out_dir.") from error
    if known == settings:
        return trials
    is_ours = isinstance(known, dict) and "rows_sha256" in known
    if overwrite and is_ours:
        log.unlink(missing_ok=True)
        _write_settings(path, settings)
        return []
    changed = [name for name in settings if not isinstance(known, dict) or known.get(name) != settings[name]]
    way = (
        " or pass overwrite=True (--overwrite on the command line) to start anew there" if is_ours else " or remove it"
    )
    raise EigenPeftError(f"{str(out)!r} holds trials with another {', '.join(changed)}; choose another out_dir,{way}.")


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    with atomic_file(path, overwrite=True) as scratch:
        scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
