"""Summaries hold the artifact's own numbers as plain data; tables and figures show all of them."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder, export_lora
from eigenpeft.errors import EigenPeftError
from eigenpeft.report import plots
from eigenpeft.report.summaries import condition, store_sizes, store_summary, subspace_summary
from eigenpeft.report.tables import absorb_table, adapter_table, findings_text, module_table, sizes_text
from eigenpeft.subspace import AdapterMember, Core
from tests.factories import make_collection


@pytest.fixture
def builder(tmp_path):
    made = make_collection(tmp_path / "adapters", noise=0.1)
    return SubspaceBuilder(5, n_pseudo_components=2).fit(AdapterCollection.from_pretrained(made.folder))


def shown(renderable):
    console = Console(width=200, record=True)
    console.print(renderable)
    return console.export_text()


def test_subspace_summary_is_plain_and_right(builder):
    summary = subspace_summary(builder.subspace_, findings=builder.findings_)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for name, bases in builder.subspace_.items():
        row = summary["modules"][name]
        assert row["shape"] == [bases.out_features, bases.in_features]
        assert row["n_components"] == 7
        assert row["explained_share"] == pytest.approx(float(bases.explained_variance_ratio.sum()))
    text = shown(module_table(summary))
    assert all(name in text for name in builder.subspace_)


def test_many_modules_are_shown_by_kind(builder):
    one = subspace_summary(builder.subspace_)
    rows = [{**next(iter(one["modules"].values())), "n_components": 3 + layer % 2} for layer in range(12)]
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(12) for kind in "qv"]
    many = one | {"modules": {name: rows[i // 2] for i, name in enumerate(names)}}
    text = shown(module_table(many))
    assert "model.layers.*.self_attn.q_proj (12)" in text
    assert "3 to 4" in text
    assert "--all shows every module" in text
    assert all(name in shown(module_table(many, every=True)) for name in names)


def test_store_summary_is_the_mean_and_the_largest(builder, tmp_path):
    store = AdapterStore.from_collection(builder.subspace_, AdapterCollection.from_pretrained(tmp_path / "adapters"))
    summary = store_summary(store)
    errors = [row["adapter-0"] for row in store.relative_errors.values()]
    assert summary["adapters"]["adapter-0"]["mean_error"] == pytest.approx(sum(errors) / len(errors))
    assert summary["adapters"]["adapter-0"]["largest_error"] == max(errors)
    assert f"{max(errors):.3g}"[:4] in shown(adapter_table(summary))


def test_sizes_stand_beside_those_of_the_original_files(builder, tmp_path):
    """Of LoRA files the sizes on disk; of a member that was trained in the bases the size of what it exports to."""
    folder = tmp_path / "adapters"
    store = AdapterStore.from_collection(builder.subspace_, AdapterCollection.from_pretrained(folder))
    files = {name: (folder / name / "adapter_model.safetensors").stat().st_size for name in store.names}
    cores = {module: Core("diagonal", {"coefficients_out": torch.ones(5)}) for module in store.subspace}
    store.add(AdapterMember(cores, record={"name": "trained"}))
    export_lora(store, tmp_path / "lora", adapter_name="trained")
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    files["trained"] = sum(tensor.numel() * tensor.element_size() for tensor in exported.values())
    summary = store_summary(store)
    assert {name: row["original_bytes"] for name, row in summary["adapters"].items()} == files
    assert store_sizes(store) == {
        name: summary[name] for name in ("bytes", "subspace_bytes", "original_bytes", "ratio")
    }
    assert summary["ratio"] == pytest.approx(store.n_bytes / sum(files.values()))
    told = sizes_text(summary, n_adapters=len(store))
    for number in (sum(files.values()), store.n_bytes, store.subspace.n_bytes, store.n_bytes - store.subspace.n_bytes):
        assert f"{number / 1000:,.1f} kB" in told
    assert f"{files['adapter-0'] / 1000:.1f}" in shown(adapter_table(summary))


def test_the_members_of_a_store_fit_eighty_columns_with_rank_size_and_base_model(builder, tmp_path):
    store = AdapterStore.from_collection(builder.subspace_, AdapterCollection.from_pretrained(tmp_path / "adapters"))
    summary = store_summary(store)
    core = next(iter(store["adapter-0"].values()))
    (row,) = {(*one["cores"], *one["ranks"]) for one in summary["adapters"].values()}
    assert row == ("low_rank", len(core.parts["coefficients_in"]))
    for name, one in summary["adapters"].items():
        one["base_model"] = "me/other" if name == "adapter-2" else "me/base"
    console = Console(width=80, record=True)
    console.print(adapter_table(summary))
    text = console.export_text()
    assert f"{len(store)} adapters of me/base" in text
    assert "name another base model: adapter-2 (me/other)." in " ".join(text.split())
    for name, one in summary["adapters"].items():
        line = next(line for line in text.splitlines() if f" {name} " in line)
        assert f" {one['bytes'] / 1000:.1f} " in line
        assert f"{one['mean_error']:.3g}" in line


def test_condition():
    assert condition(torch.tensor([4.0, 2.0, 0.5])) == 8.0
    assert condition(torch.zeros(0)) is None


def test_hostile_names_are_shown_as_they_are(tmp_path):
    made = make_collection(tmp_path / "adapters", n_adapters=1)
    (made.folder / "adapter-0").rename(made.folder / "[red]x")
    builder = SubspaceBuilder(2).fit(AdapterCollection.from_pretrained(made.folder))
    store = AdapterStore.from_collection(builder.subspace_, AdapterCollection.from_pretrained(made.folder))
    assert "[red]x" in shown(adapter_table(store_summary(store)))
    assert findings_text(()) is not None


def test_spectra_are_drawn_whole_or_not_at_all(builder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    plots.plot_spectra(builder.subspace_, tmp_path / "deep" / "spectra.png")
    assert (tmp_path / "deep" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["spectra.png"]
    monkeypatch.setattr(plots, "Figure", None)
    with pytest.raises(EigenPeftError, match=r"pip install 'eigenpeft\[plots\]'"):
        plots.plot_spectra(builder.subspace_, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(("n_layers", "rows"), [(3, 3), (30, 1)])
def test_many_banks_that_grew_are_shown_by_kind(n_layers, rows):
    banks = {f"layers.{i}.q_proj": {"before": [24, 24], "after": [26 + i % 3, 25]} for i in range(n_layers)}
    table = absorb_table({"banks": banks})
    assert table.row_count == rows
    names, before, after = (list(column.cells) for column in table.columns)
    if rows == 1:
        assert (names, before, after) == (["layers.*.q_proj (30)"], ["24 x 24"], ["26 to 28 x 25"])
        assert table.caption == "A row per kind of bank. --json shows every bank."
    else:
        assert (names, after) == (list(banks), ["26 x 25", "27 x 25", "28 x 25"])
