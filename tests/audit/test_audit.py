"""The audit tells planted, random and same-seed collections apart, and names what is odd about real ones."""

import json

import pytest
import torch

from eigenpeft import AdapterCollection
from eigenpeft.audit import audit_adapters
from eigenpeft.errors import SubspaceError
from tests.factories import make_collection, random_factors, write_adapter

MODULES = {"layer.0.query": (60, 80), "layer.1.query": (60, 80)}


def audited(folder, **options):
    return audit_adapters(AdapterCollection.from_pretrained(folder), progress=False, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_subspace_is_found_with_its_dimension(tmp_path, seed):
    made = make_collection(tmp_path, n_adapters=10, modules=MODULES, rank=(3, 4), n_shared=6, noise=0.02, seed=seed)
    report = audited(made.folder, n_components=16, seed=seed)
    assert report.verdict == "shared"
    assert report.n_components in (5, 6, 7)
    assert report.held_out.real[5] > 0.9
    assert report.held_out.null[5] < 0.1
    assert max(report.unshared.values()) < 0.15
    for module in report.modules.values():
        assert module.effective_rank_in < module.null_effective_rank_in


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_adapters_share_nothing(tmp_path, seed):
    for i in range(8):
        write_adapter(tmp_path / f"a{i}", random_factors(modules=MODULES, rank=4, seed=100 * seed + i))
    report = audited(tmp_path, n_components=16, seed=seed)
    assert report.verdict == "not shared"
    for k in (4, 8, 16):
        assert report.held_out.real[k - 1] == pytest.approx(report.held_out.null[k - 1], abs=0.05)
        # What looks like sharing is there for random adapters too: that is what the null is for.
        assert report.explained.real[k - 1] == pytest.approx(report.explained.null[k - 1], abs=0.05)


def same_seed(folder, *, n_adapters, seed, first=0):
    start = random_factors(modules=MODULES, rank=4, seed=1000 + seed)
    for i in range(n_adapters):
        own = random_factors(modules=MODULES, rank=4, seed=100 * seed + first + i)
        factors = {
            name: (own[name][0], start[name][1] + 0.1 * torch.randn(4, 80, generator=torch.Generator().manual_seed(i)))
            for name in MODULES
        }
        write_adapter(folder / f"s{seed}-{i}", factors)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_common_start_is_told_from_a_shared_subspace(tmp_path, seed, n_seeds):
    for start in range(n_seeds):
        same_seed(tmp_path, n_adapters=6 // n_seeds + 1, seed=10 * seed + start)
    report = audited(tmp_path, n_components=16, seed=seed)
    assert report.verdict == "shared only through a common seed"
    assert len(report.groups) == n_seeds
    assert "same_start" in {finding.kind for finding in report.findings}


def test_the_real_adapters_are_not_called_shared(real_adapters_dir):
    report = audited(real_adapters_dir, n_components=32, n_nulls=1)
    assert report.verdict == "not shared"
    found = {(finding.kind, finding.adapters) for finding in report.findings}
    assert ("untrained", ("bhavesh",)) in found
    assert ("outlier_norm", ("fegbewunmi",)) in found
    assert ("same_start", ("parikshit_medical", "parikshit_sports")) in found
    assert ("related", ("laziestcactus", "laziestcactus_ckpt7500")) in found
    assert "bhavesh" not in report.adapters
    # The share that all of them explain is high, and as high for random adapters of the same sizes.
    assert report.explained.real[31] > 0.95
    assert report.explained.null[31] > 0.95
    assert report.held_out.real[31] < 0.1
    # Both figures are reported: with the pair of related runs beside each other, and without.
    assert report.held_out_unrelated.real[31] < 0.8 * report.held_out.real[31]
    assert "hold shares of each other" in report.advice


def test_same_seed_same_report_and_plain_json(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules=MODULES, noise=0.1)
    reports = [audited(made.folder, n_components=8, seed=5) for _ in range(2)]
    assert reports[0] == reports[1]
    assert json.loads(json.dumps(reports[0].to_dict(), allow_nan=False))["verdict"] == reports[0].verdict
    assert audited(made.folder, n_components=8, seed=6).held_out.null != reports[0].held_out.null


def test_missing_modules_and_mixed_ranks(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, modules=MODULES, rank=(2, 5), noise=0.1)
    write_adapter(tmp_path / "half", random_factors(modules={"layer.0.query": (60, 80)}, rank=3))
    report = audited(made.folder, n_components=12)
    assert report.modules["layer.0.query"].n_adapters == 5
    assert report.modules["layer.1.query"].n_adapters == 4
    assert set(report.unshared) == {*made.names, "half"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_components": 0}, "n_components=0"), ({"n_nulls": 0}, "n_nulls=0"), ({"n_components": 2.5}, "2.5")],
)
def test_refusals(tmp_path, options, message):
    made = make_collection(tmp_path, n_adapters=3)
    with pytest.raises(SubspaceError, match=message):
        audited(made.folder, **options)


def test_too_few_adapters(tmp_path):
    made = make_collection(tmp_path, n_adapters=2)
    with pytest.raises(SubspaceError, match="at least 3 that change something; of the 2 given, 2 do"):
        audited(made.folder)


def test_adapters_of_different_modules_share_nothing(tmp_path):
    for number in range(3):
        write_adapter(tmp_path / f"{number}", random_factors(modules={f"layer.{number}.query": (12, 20)}, seed=number))
    with pytest.raises(
        SubspaceError, match="None of the 3 modules is changed by two adapters.* the same target modules"
    ):
        audited(tmp_path)


def test_two_families_are_two_clusters(tmp_path):
    for seed in (1, 2):
        made = make_collection(tmp_path / f"f{seed}", n_adapters=5, modules=MODULES, n_shared=5, noise=0.02, seed=seed)
        for folder in list(made.folder.iterdir()):
            folder.rename(tmp_path / f"f{seed}" / f"family{seed}-{folder.name}")
    report = audited([tmp_path / "f1", tmp_path / "f2"], n_components=12)
    assert [{name.split("-")[0] for name in part} for part in report.clusters] == [{"family1"}, {"family2"}]
    # K = 10 directions hold both families, so that a cluster's own subspace has nothing to add there.
    assert report.n_components == pytest.approx(10, abs=1)
    assert report.cluster_gain == pytest.approx(0.0, abs=0.02)
    assert "one subspace per cluster" not in report.advice


def test_clusters_are_advised_where_there_is_no_room_for_all(tmp_path):
    for seed in (1, 2, 3):
        made = make_collection(tmp_path / f"f{seed}", n_adapters=5, modules=MODULES, n_shared=5, noise=0.02, seed=seed)
        for folder in list(made.folder.iterdir()):
            folder.rename(tmp_path / f"f{seed}" / f"family{seed}-{folder.name}")
    report = audited([tmp_path / f"f{seed}" for seed in (1, 2, 3)], n_components=6)
    assert len(report.clusters) == 3
    assert report.cluster_gain > 0.2
    assert "build one subspace per cluster" in report.advice


def test_random_adapters_are_no_clusters(tmp_path):
    for i in range(6):
        write_adapter(tmp_path / f"a{i}", random_factors(modules=MODULES, rank=4, seed=i))
    report = audited(tmp_path, n_components=8)
    assert len(report.clusters) == 6
    assert report.cluster_gain is None
    assert report.held_out_output.real[7] == pytest.approx(8 / 60, abs=0.04)


def runs(folder, *, n_runs, seed, likeness=0.6):
    """Two adapters a run: a common update and one of their own, their factors turned so that no start is to be seen."""
    for run in range(n_runs):
        common = random_factors(modules=MODULES, rank=4, seed=1000 * seed + run)
        for i in range(2):
            own = random_factors(modules=MODULES, rank=4, seed=1000 * seed + 100 * (i + 1) + run)
            generator = torch.Generator().manual_seed(1000 * seed + 10 * run + i)
            factors = {}
            for name in MODULES:
                turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
                lora_B = torch.cat([common[name][0], likeness * own[name][0]], dim=1)
                lora_A = torch.cat([common[name][1], own[name][1]])
                factors[name] = (lora_B @ turn.mT, turn @ lora_A)
            write_adapter(folder / f"run{run}-{i}", factors)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_related_runs_do_not_make_a_shared_subspace(tmp_path, seed):
    runs(tmp_path, n_runs=4, seed=seed)
    report = audited(tmp_path, n_components=24, seed=seed)
    k = report.n_components - 1
    assert {finding.kind for finding in report.findings} == {"related"}
    assert report.held_out.real[k] > report.held_out.null[k] + 0.25
    assert report.held_out_unrelated.real[k] == pytest.approx(report.held_out.null[k], abs=0.1)
    assert report.verdict == "shared only by related runs"
    assert f"{report.held_out_unrelated.real[k]:.1%}" in report.advice


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n_shared", [1, 2, 3, 5])
def test_a_small_shared_subspace_is_not_taken_for_relatives(tmp_path, seed, n_shared):
    """In few shared directions many adapters are related by chance; that must not speak against them."""
    made = make_collection(tmp_path, n_adapters=10, modules=MODULES, rank=4, n_shared=n_shared, noise=0.02, seed=seed)
    report = audited(made.folder, n_components=12, seed=seed)
    assert "related" in {finding.kind for finding in report.findings}
    assert report.verdict == "shared"


def test_unrelated_adapters_have_no_second_figure(tmp_path):
    for i in range(5):
        write_adapter(tmp_path / f"a{i}", random_factors(modules=MODULES, rank=4, seed=i))
    report = audited(tmp_path, n_components=8)
    assert report.held_out_unrelated is None
    assert "relatives" not in report.advice
