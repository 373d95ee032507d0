"""Model cards of subspaces and stores: complete without editing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from eigenpeft.artifacts.plain_text import for_card, for_code
from eigenpeft.collection.base_models import hub_id
from eigenpeft.subspace.info import SubspaceInfo

# From the most to the least permissive; anything unknown counts as more restrictive than all of them.
_LICENSES = (
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
        n_components: K_in and K_out.
        explained_share: Share of the adapters' squared ΔW norms.
    """

    module: str
    shape: tuple[int, int]
    n_components: tuple[int, int]
    explained_share: float


_LOAD_SUBSPACE = """```python
import eigenpeft  # pip install eigenpeft; makes the method known to PEFT
from peft import get_peft_model

config = eigenpeft.EigenLoraConfig(subspace="<this repository or its local path>", r=8)
model = get_peft_model(base_model, config)  # trains coefficients on the frozen components
```

The file is plain safetensors: `<module>.components_in` (K_in, in_features) and `<module>.components_out` (K_out, out_features)
hold one component per row, so `components_out.T @ C_out @ C_in @ components_in` is a weight update without this package. The
rows are orthonormal, except those of `paired_banks`, which have unit norm and diagonal cores. A module that `shared_banks` in
`subspace_config.json` lists uses the components of the module named there."""

_LOAD_STORE = """```python
import eigenpeft  # pip install eigenpeft

store = eigenpeft.AdapterStore.from_pretrained("<this repository or its local path>")
eigenpeft.export_lora(store, "plain-lora", adapter_name=store.names[0])  # an ordinary PEFT adapter, needs nothing
```

`subspace.safetensors` holds the bases. `members.index` has one line per change (a hash, then JSON), which says in which
`.shard` file per member lies, from which byte on and how many; those bytes are a safetensors file of their own."""
_LISTED = 100  # members that a card lists by name


def most_restrictive_license(sources: Iterable[Mapping[str, Any]]) -> str:
    """The license of the source adapters that asks most of its users; "unknown" if any names none.

    Args:
        sources: Records of the source adapters.
    """
    licenses = {license_of(source).lower() or "unknown" for source in sources}
    if not licenses or any(license not in _LICENSES for license in licenses):
        return "unknown"
    return max(licenses, key=_LICENSES.index)


def license_of(source: Mapping[str, Any]) -> str:
    """The license that a record names, also under the older spelling of format 1; empty if it names none.

    Args:
        source: Record of an adapter.
    """
    return str(source.get("license") or source.get("licence") or "")


def shown_base(name: str | None) -> str:
    """The base model as a card names it: of a local folder, which others do not have, only its own name.

    Args:
        name: Hub id, path or None.
    """
    if name is None:
        return "not recorded"
    known = hub_id(name)
    return f"`{for_code(known)}`" if known else f"`{for_code(PurePath(name).name)}`, a local folder"


def subspace_card(info: SubspaceInfo, rows: Sequence[ModuleRow], *, fingerprint: str) -> str:
    """Text of README.md for a subspace.

    Args:
        info: Where the subspace comes from.
        rows: One per module.
        fingerprint: SHA-256 of the tensors.
    """
    title = f"Principal subspace of {len(info.sources)} LoRA adapters"
    return _card(title, "principal-subspace", info, rows, load=_LOAD_SUBSPACE, sources=info.sources, end=fingerprint)


def store_card(
    info: SubspaceInfo,
    rows: Sequence[ModuleRow],
    *,
    fingerprint: str,
    n_members: int,
    members: Sequence[Mapping[str, Any]],
) -> str:
    """Text of README.md for a store.

    Args:
        info: Where its subspace comes from.
        rows: One per module.
        fingerprint: SHA-256 of the bases.
        n_members: How many members it has when the card is written. The title does not count them: a member that is added
            from Python is written without the card.
        members: Their records; of large stores the first ones, whose licenses count for the whole.
    """
    listed = [
        f"| {for_card(member.get('name'))} | {for_card(member.get('source'))} | {for_card(member.get('task_type'))} | "
        f"{for_card(license_of(member))} |"
        for member in members[:_LISTED]
    ]
    more = f"\nand {n_members - len(listed)} more.\n" if n_members > len(listed) else ""
    rows_of_members = "| member | source | task | license |\n|---|---|---|---|\n" + "\n".join(listed) if listed else ""
    table = f"""## Members

`eigenpeft store list` shows those that there are. When this card was written there {_were(n_members)}

{rows_of_members}
{more}
"""
    sources = [*info.sources, *members]
    return _card(
        "Adapter store of LoRA adapters in one subspace",
        "adapter-store",
        info,
        rows,
        load=_LOAD_STORE,
        sources=sources,
        end=fingerprint,
        table=table,
    )


def _card(
    title: str,
    tag: str,
    info: SubspaceInfo,
    rows: Sequence[ModuleRow],
    *,
    load: str,
    sources: Sequence[Mapping[str, Any]],
    end: str,
    table: str = "",
) -> str:
    license = most_restrictive_license(sources)
    data = ModelCardData(
        base_model=hub_id(info.base_model_name_or_path),
        library_name="eigenpeft",
        tags=["eigenpeft", "lora", tag],
        license=license if license != "unknown" else "other",
    )
    share = sum(row.explained_share for row in rows) / len(rows)
    note = " (at least one adapter names none: ask its author)" if license == "unknown" else ""
    revision = f", revision `{for_code(info.base_model_revision)}`" if info.base_model_revision else ""
    body = f"""# {title}

Base model: {shown_base(info.base_model_name_or_path)}{revision}. For each of
{len(rows)} adapted weights: two bases, fitted
with `method="{for_code(info.method)}"`, `weighting="{for_code(info.weighting)}"`,
{_number_asked_for(info)}, {info.n_pseudo_components} pseudo-components, seed {info.seed}, by eigenpeft
{for_card(info.eigenpeft_version)}.
They explain {share:.1%} of the adapters' squared update norms (mean over the modules, measured on
{len(info.measured_on)} adapters). That figure alone does not say that a new task will train well in it: compare with a
random subspace of the same size before relying on it.

## How to load it

{load}

{table}## Modules

| module | shape | components | explained share |
|---|---|---|---|
{chr(10).join(_module_row(row) for row in rows)}

## Source adapters

Most restrictive license among them: **{license}**{note}.

| adapter | source | revision | rank | alpha | license | sha256 |
|---|---|---|---|---|---|---|
{chr(10).join(source_row(source) for source in info.sources)}

SHA-256 of the tensors' names, shapes and values: `{end}`.

## Citation

Principal subspaces of LoRA adapters: EigenLoRAx, arXiv 2502.04700.
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _were(n_members: int) -> str:
    return f"{'was 1' if n_members == 1 else f'were {n_members}'}:" if n_members else "were none yet."


def _number_asked_for(info: SubspaceInfo) -> str:
    if info.n_components is None:
        return "32 components or all there are"
    return f"`n_components={for_code(info.n_components)}`"


def _module_row(row: ModuleRow) -> str:
    n_in, n_out = row.n_components
    counts = str(n_in) if n_in == n_out else f"{n_in} (in), {n_out} (out)"
    return f"| `{for_code(row.module)}` | {row.shape[0]} × {row.shape[1]} | {counts} | {row.explained_share:.3f} |"


def source_row(source: Mapping[str, Any]) -> str:
    """One source adapter as a row of a card's table.

    Args:
        source: Its record.
    """
    cells = [*(source.get(key) for key in ("name", "source", "revision", "rank", "lora_alpha")), license_of(source)]
    return "| " + " | ".join([*map(for_card, cells), f"`{for_code(str(source.get('sha256') or '')[:12])}`"]) + " |"
