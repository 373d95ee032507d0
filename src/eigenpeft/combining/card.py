"""Model card of a merged adapter: sources, licenses, rule and numbers, complete without editing."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from eigenpeft.artifacts.plain_text import for_card, for_code
from eigenpeft.collection.base_models import hub_id
from eigenpeft.combining.report import MergeReport
from eigenpeft.subspace.card import most_restrictive_license, source_row


def merged_card(
    report: MergeReport, *, records: Sequence[dict[str, Any]], base_model: str | None, heads: Sequence[str]
) -> str:
    """Text of README.md.

    Args:
        report: What the merge did.
        records: Records of the source adapters.
        base_model: Base model, if known.
        heads: Adapters whose heads lie beside it.
    """
    license = most_restrictive_license(records)
    base_model = hub_id(base_model)  # a card names no folder of its author's
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        tags=["eigenpeft", "lora", "merge", *([f"base_model:adapter:{base_model}"] if base_model else [])],
        license=license if license != "unknown" else "other",
    )
    note = " (at least one adapter names none: ask its author)" if license == "unknown" else ""
    low, high = report.scale_range
    scale = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    kept = (
        "\nNo rule merges heads: each source's own lies in `heads/<name>/`. Put it into the model with\n"
        '`eigenpeft.combining.load_head(model, folder="<path of this adapter>", name="' + for_code(heads[0]) + '")`.\n'
        if heads
        else ""
    )
    rows = "\n".join(_row(source.name, source.weight, source.relative_distance) for source in report.sources)
    body = f"""# {report.title} of {len(report.sources)} LoRA adapters

One ordinary LoRA of rank {report.rank} in {report.n_modules} modules, made by eigenpeft from the updates themselves (scaling
included), in their core space: `rule="{report.rule}"`{_options(report)}, {report.paper}. Final multiplier: {scale}
(`scale={report.scale!r}`).

## Loading this adapter

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this repository or its local path>")
```
{kept}
## What the merge did

The cut to rank {report.rank} kept {report.kept_share:.2%} of the squared norm of the merged update (its full rank is
{report.full_rank}). Stable rank {report.stable_rank:.2f}; over-counting {report.over_counting:.2f} (1: as strong along its
directions as the sources are). A distance of 0 is the source itself, of 1 as far from it as the base model is. No number here
says how well it does a task: measure that beside each source and the base model.

| source | weight | relative distance |
|---|---|---|
{rows}

## Source adapters

Most restrictive license among them: **{license}**{note}.

| adapter | source | revision | rank | alpha | license | sha256 |
|---|---|---|---|---|---|---|
{chr(10).join(source_row(record) for record in records)}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _options(report: MergeReport) -> str:
    options = "".join(f", `{name}={value!r}`" for name, value in report.options.items())
    return options + (f", calibrated by {' and '.join(report.calibrate)}" if report.calibrate else "")


def _row(name: str, weight: float, distance: float | None) -> str:
    return f"| {for_card(name)} | {weight:g} | {'untrained' if distance is None else f'{distance:.3f}'} |"
