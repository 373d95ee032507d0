"""The first answer: what error the adapters have in how many numbers, in a subspace fitted to all of them or cut one by one."""

from collections.abc import Mapping

from eigenpeft.audit.adapters.measures import ModuleMeasures
from eigenpeft.audit.answers import Compress, CompressRow

# Of ‖ΔW‖², which is an error of 22 % of ‖ΔW‖. And how much smaller the whole must be. Conventions: the table has the rest.
KEPT_ENOUGH, SMALL_ENOUGH = 0.95, 0.9
_NAMES = {"full": "components", "diagonal": "paired directions (method='paired', one number each)"}
# Options of `eigenpeft build` that make the bases of a row.
_HOW = {
    "full": "",
    "diagonal": "--method paired ",
}
_ALL_RANKS = 8  # ranks up to here are all shown
_SHOWN = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def compress_answer(measured: Mapping[str, ModuleMeasures], *, n_adapters: int) -> Compress:
    """Error and parameters per adapter for several K, and whether any K that keeps 95 % of ‖ΔW‖² is smaller than the LoRAs.

    Args:
        measured: Module name to its measures.
        n_adapters: Number of adapters; a module that an adapter does not have costs it nothing.
    """
    most = max(len(module.real.explained) for module in measured.values())
    n_lora_parameters = sum(module.n_lora_parameters for module in measured.values())
    shown = sorted({*(size for size in _SHOWN if size <= most), most})
    rows = tuple(_row(measured, n_components, n_lora_parameters) for n_components in shown)
    # A number of pairs is shown where every module has as many.
    counts = sorted(set.intersection(*(set(module.paired) for module in measured.values())))
    rows += tuple(_paired_row(measured, n_components, n_lora_parameters) for n_components in counts)
    cut = _cut_rows(measured, n_adapters, n_lora_parameters)
    enough = [row for row in rows if row.kept_share >= KEPT_ENOUGH and row.ratio <= SMALL_ENOUGH]
    each = round(n_lora_parameters / n_adapters)
    if enough:
        best = min(enough, key=lambda row: row.ratio)
        return Compress(
            answer="yes",
            text=f"Yes. With {best.n_components} {_NAMES[best.core]} per module every adapter keeps {best.kept_share:.1%} of "
            f"‖ΔW‖² (an error of {best.relative_error:.1%}) in {best.n_parameters:,} numbers instead of {each:,}; with the bases, "
            f"which all of them share, that is {best.ratio:.0%} of the plain LoRAs. {_how(measured, best, n_lora_parameters)}"
            f"{_control(best, cut)} Judge one adapter on its own task before you throw its LoRA away.",
            n_lora_parameters=each,
            rows=rows + cut,
        )
    nearest = max((row for row in rows if row.ratio <= SMALL_ENOUGH), key=lambda row: row.kept_share, default=None)
    best_found = (
        f"The best that is smaller than the LoRAs, {nearest.n_components} {_NAMES[nearest.core]} per module, keeps "
        f"{nearest.kept_share:.1%} (an error of {nearest.relative_error:.1%}). {_how(measured, nearest, n_lora_parameters)}"
        if nearest
        else "No number of components looked at is smaller than the LoRAs."
    )
    return Compress(
        answer="no",
        text=f"No. {n_adapters} adapters of {each:,} numbers need so many components to keep 95 % of ‖ΔW‖² that nothing is "
        f"saved. {best_found}{_control(nearest, cut)} More adapters share the cost of the bases: ask again with more.",
        n_lora_parameters=each,
        rows=rows + cut,
    )


def _how(measured: Mapping[str, ModuleMeasures], row: CompressRow, n_lora_parameters: int) -> str:
    """The commands that make a row, and the size of the store that comes out."""
    if any(len(module.real.explained) < row.n_components for module in measured.values()):
        return (
            f"Some modules have fewer than {row.n_components} directions: make it with `eigenpeft build ADAPTERS --out subspace` "
            "and `-k 'PATTERN=NUMBER'` for each kind of module."
        )
    numbers = 0
    for module in measured.values():
        width = sum(module.shape)
        # A store keeps a diagonal core of K numbers, or a projected LoRA's two factors on the components: 2 r K.
        each = len(module.adapters) if _HOW[row.core] else 2 * module.n_lora_parameters / width
        numbers += row.n_components * (width + each)
    return (
        f"To do it: `eigenpeft build ADAPTERS {_HOW[row.core]}-k {row.n_components} --out subspace` and `eigenpeft store add "
        "store ADAPTERS --subspace subspace`, "
        f"which writes {4e-3 * numbers:,.0f} kB for {4e-3 * n_lora_parameters:,.0f} kB of LoRAs (in float32, beside heads and "
        "records)."
    )


def _cut_rows(
    measured: Mapping[str, ModuleMeasures], n_adapters: int, n_lora_parameters: int
) -> tuple[CompressRow, ...]:
    """The control: each LoRA cut to a lower rank on its own, which needs no subspace."""
    rows = []
    for rank in range(1, max(len(module.truncated) for module in measured.values())):
        kept_share = sum(module.truncated[min(rank, len(module.truncated)) - 1] for module in measured.values()) / len(
            measured
        )
        numbers = sum(sum(min(rank, own) for own in module.ranks) * sum(module.shape) for module in measured.values())
        rows.append(
            _shown(
                "truncated",
                n_components=rank,
                n_parameters=round(numbers / n_adapters),
                kept_share=kept_share,
                ratio=numbers / max(n_lora_parameters, 1),
            )
        )
    return tuple(row for row in rows if row.n_components <= _ALL_RANKS or row.n_components in _SHOWN)


def _control(best: CompressRow | None, cut: tuple[CompressRow, ...]) -> str:
    """What cutting each LoRA alone keeps, in as little as the best row where that is as good, else the least that keeps enough."""
    as_good = [row for row in cut if best is not None and row.kept_share >= best.kept_share and row.ratio <= best.ratio]
    enough = [row for row in cut if row.kept_share >= KEPT_ENOUGH and row.ratio <= SMALL_ENOUGH]
    if not as_good and not enough:
        return ""
    row = min(as_good or enough, key=lambda each: each.ratio)
    start = "But no subspace is needed for that: each" if as_good else "Beside that, each"
    return f" {start} LoRA cut to rank {row.n_components} on its own keeps {row.kept_share:.1%} in {row.ratio:.0%} of the numbers."


def _row(measured: Mapping[str, ModuleMeasures], n_components: int, n_lora_parameters: int) -> CompressRow:
    kept_share, core, bases, total = 0.0, 0, 0, 0
    for module in measured.values():
        own = min(n_components, *module.shape, len(module.real.explained))
        kept_share += float(module.real.explained[own - 1]) / len(measured)
        core += own * own
        bases += own * sum(module.shape)
        total += own * own * len(module.adapters)
    return _shown(
        "full",
        n_components=n_components,
        n_parameters=core,
        kept_share=kept_share,
        ratio=(bases + total) / max(n_lora_parameters, 1),
    )


def _paired_row(measured: Mapping[str, ModuleMeasures], n_components: int, n_lora_parameters: int) -> CompressRow:
    kept_share = sum(module.paired[n_components] for module in measured.values()) / len(measured)
    numbers = sum(n_components * (sum(module.shape) + len(module.adapters)) for module in measured.values())
    return _shown(
        "diagonal",
        n_components=n_components,
        n_parameters=n_components * len(measured),
        kept_share=kept_share,
        ratio=numbers / max(n_lora_parameters, 1),
    )


def _shown(core: str, *, n_components: int, n_parameters: int, kept_share: float, ratio: float) -> CompressRow:
    kept_share = min(kept_share, 1.0)
    return CompressRow(
        core=core,
        n_components=n_components,
        n_parameters=n_parameters,
        kept_share=kept_share,
        relative_error=max(1.0 - kept_share, 0.0) ** 0.5,
        ratio=ratio,
    )
