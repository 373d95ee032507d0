"""Model cards of subspaces and stores: complete without editing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from eigenpeft.subspace.info import SubspaceInfo

# From the most to the least permissive; anything unknown counts as more restrictive than all of them.
_LICENCES = (
    "cc0-1.0",
    "unlicense",
    "mit",
    "bsd-3-clause",
    "apache-2.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "mpl-2.0",
    "lgpl-3.0",
    "gpl-3.0",
    "cc-by-nc-4.0",
)


@dataclass(frozen=True)
class ModuleRow:
    """What a card says of one module.

    Attributes:
        module: Its name.
        shape: (out_features, in_features).
        n_components: Components a side.
        explained_share: Share of the adapters' squared ΔW norms.
    """

    module: str
    shape: tuple[int, int]
    n_components: int
    explained_share: float


_LOAD_SUBSPACE = """```python
import eigenpeft  # pip install eigenpeft; makes the method known to PEFT
from peft import get_peft_model

config = eigenpeft.EigenLoraConfig(subspace="<this repository or its local path>", r=8)
model = get_peft_model(base_model, config)  # trains coefficients on the frozen components
```

The file is plain safetensors: `<module>.components_in` (K, in_features) and `<module>.components_out` (K, out_features)
hold orthonormal rows, so `components_out.T @ C_out @ C_in @ components_in` is a weight update without this package."""

_LOAD_STORE = """```python
import eigenpeft  # pip install eigenpeft

store = eigenpeft.CoefficientStore.from_pretrained("<this repository or its local path>")
eigenpeft.export_lora(store, "plain-lora", adapter_name=store.names[0])  # an ordinary PEFT adapter, needs nothing
```"""


def most_restrictive_licence(sources: Sequence[dict[str, Any]]) -> str:
    """The licence of the source adapters that asks most of its users; "unknown" if any names none.

    Args:
        sources: Records of the source adapters.
    """
    licences = {str(source.get("licence") or "unknown").lower() for source in sources}
    if not licences or any(licence not in _LICENCES for licence in licences):
        return "unknown"
    return max(licences, key=_LICENCES.index)


def subspace_card(info: SubspaceInfo, rows: Sequence[ModuleRow], *, fingerprint: str, is_store: bool = False) -> str:
    """Text of README.md for a subspace or a store.

    Args:
        info: Where the subspace comes from.
        rows: One a module.
        fingerprint: SHA-256 of the tensors.
        is_store: Whether the coefficients of the adapters travel with it.
    """
    licence = most_restrictive_licence(info.sources)
    data = ModelCardData(
        base_model=info.base_model_name_or_path,
        library_name="eigenpeft",
        tags=["eigenpeft", "lora", "coefficient-store" if is_store else "principal-subspace"],
        license=licence if licence != "unknown" else "other",
    )
    share = sum(row.explained_share for row in rows) / len(rows)
    title = "Coefficient store" if is_store else "Principal subspace"
    note = " (at least one adapter names none: ask its author)" if licence == "unknown" else ""
    body = f"""# {title} of {len(info.sources)} LoRA adapters

Base model: `{info.base_model_name_or_path}`. For each of {len(rows)} adapted weights: two orthonormal bases, fitted
with `method="{info.method}"`, `weighting="{info.weighting}"`, `n_components={info.n_components}`,
{info.n_pseudo_components} pseudo-components, seed {info.seed}, by eigenpeft {info.eigenpeft_version}.
They explain {share:.1%} of the adapters' squared update norms (mean over the modules, measured on
{len(info.measured_on)} adapters). That figure alone does not say that a new task will train well in it: compare with a
random subspace of the same size before relying on it.

## How to load it

{_LOAD_STORE if is_store else _LOAD_SUBSPACE}

## Modules

| module | shape | components | explained share |
|---|---|---|---|
{chr(10).join(_module_row(row) for row in rows)}

## Source adapters

Most restrictive licence among them: **{licence}**{note}.

| adapter | source | revision | rank | alpha | licence | sha256 |
|---|---|---|---|---|---|---|
{chr(10).join(source_row(source) for source in info.sources)}

SHA-256 of the tensors' names, shapes and values: `{fingerprint}`.

## Citation

Principal subspaces of LoRA adapters: EigenLoRAx, arXiv 2502.04700.
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _module_row(row: ModuleRow) -> str:
    return f"| `{row.module}` | {row.shape[0]} × {row.shape[1]} | {row.n_components} | {row.explained_share:.3f} |"


def source_row(source: dict[str, Any]) -> str:
    """One source adapter as a row of a card's table.

    Args:
        source: Its record.
    """
    cells = [source.get(key) for key in ("name", "source", "revision", "rank", "lora_alpha", "licence")]
    # Names come from other people's files: nothing in them may end the cell or the row.
    texts = [str(cell if cell is not None else "").replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join([*texts, f"`{str(source.get('sha256') or '')[:12]}`"]) + " |"
