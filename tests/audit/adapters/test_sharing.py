"""What sharing a bank costs: beside banks that are fitted anew without each adapter, and on collections whose truth is known."""

import json
from statistics import fmean

import pytest
import torch

from eigenpeft import AdapterCollection
from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.building import build_shared_subspace
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.stores.adapter_files import projected
from tests.factories import make_collection, random_factors, write_adapter

LAYERS = {f"layer.{i}.{name}": shape for i in range(3) for name, shape in (("query", (40, 48)), ("value", (30, 48)))}


def audited(folder, **options):
    options = {"n_components": 12, "n_nulls": 2, "progress": False, "share": "layers"} | options
    return audit_adapters(AdapterCollection.from_pretrained(folder), **options)


def in_one_subspace(folder, *, n_adapters=6, rank=3, n_shared=5):
    """Adapters whose updates of one kind lie in one pair of subspaces, the same in every layer."""
    generator = torch.Generator().manual_seed(0)
    spans = {
        kind: [torch.randn(size, n_shared, generator=generator) for size in shape]
        for kind, shape in (("query", (40, 48)), ("value", (30, 48)))
    }
    for i in range(n_adapters):
        factors = {}
        for module in LAYERS:
            out, in_side = spans[module.rpartition(".")[2]]
            factors[module] = (
                out @ torch.randn(n_shared, rank, generator=generator),
                torch.randn(rank, n_shared, generator=generator) @ in_side.T,
            )
        write_adapter(folder / f"a{i}", factors)
    return folder


def test_the_share_is_that_of_banks_fitted_without_the_adapter(tmp_path):
    made = make_collection(tmp_path, n_adapters=5, modules=LAYERS, rank=(2, 3), noise=0.3)
    report = audited(made.folder)
    collection = AdapterCollection.from_pretrained(made.folder)
    sharing = report.sharing
    assert sharing is not None
    assert (sharing.n_modules, sharing.n_banks) == (6, 2)
    for row in sharing.rows:
        k, shares = row.n_components, []
        for name in collection.names:
            subspace = build_shared_subspace(collection.without(name), n_components=k, progress=False)
            errors = projected(collection, name, subspace, in_part=True).relative_errors
            shares.append(fmean(1 - error**2 for error in errors.values()))
        assert row.shared == pytest.approx(fmean(shares), abs=2e-3)
        assert row.own == pytest.approx(report.held_out.real[k - 1], abs=1e-9)
        assert row.own_null == pytest.approx(report.held_out.null[k - 1], abs=1e-9)
        assert row.low <= row.own - row.shared <= row.high
        assert row.shared_bytes == 4 * k * (88 + 78)
        assert row.own_bytes == 3 * row.shared_bytes


def test_layers_of_one_subspace_share_a_bank_for_nothing(tmp_path):
    rows = {row.n_components: row for row in audited(in_one_subspace(tmp_path)).sharing.rows}
    assert rows[8].shared > 0.99
    assert abs(rows[8].own - rows[8].shared) < 0.01
    assert rows[8].shared_null < 0.5


def test_layers_of_different_subspaces_pay_for_it(tmp_path):
    made = make_collection(tmp_path, n_adapters=6, modules=LAYERS, rank=3, n_shared=4, noise=0.02)
    report = audited(made.folder)
    row = next(row for row in report.sharing.rows if row.n_components == 4)
    assert row.own > 0.9
    assert row.shared < 0.7
    assert row.low > 0.2
    assert "2 shared banks in the place of 6" in report.sharing.text
    assert f"at K = {report.n_components}" in report.sharing.text


def test_adapters_without_a_module_and_untrained_ones_do_not_count(tmp_path):
    for i in range(4):
        factors = random_factors(modules=LAYERS, rank=2, seed=i)
        if i == 0:
            del factors["layer.1.query"]
        write_adapter(tmp_path / f"a{i}", factors)
    zero = {name: (0 * B, A) for name, (B, A) in random_factors(modules=LAYERS, rank=2, seed=9).items()}
    write_adapter(tmp_path / "zero", zero)
    sharing = audited(tmp_path).sharing
    assert all(0 <= row.shared <= 1 for row in sharing.rows)


def test_patterns_and_modules_that_share_nothing(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules=LAYERS)
    assert audited(made.folder, share=["*.query"]).sharing.n_banks == 4
    alone = audited(made.folder, share=lambda module: module).sharing
    assert alone.n_banks == alone.n_modules == 6
    assert alone.text.startswith("No two of the 6 modules are of one kind")
    assert all(row.own == row.shared for row in alone.rows)
    assert audited(made.folder, share=None).sharing is None
    with pytest.raises(SubspaceError, match="share='heads' must be 'layers'"):
        audited(made.folder, share="heads")


def test_it_comes_back_from_json(tmp_path):
    report = audited(make_collection(tmp_path, n_adapters=4, modules=LAYERS).folder)
    assert AuditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
