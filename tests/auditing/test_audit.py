"""The audit tells planted, random and same-seed collections apart, and names what is odd about real ones."""

import json

import pytest
import torch

from eigenpeft import AdapterCollection
from eigenpeft.auditing import audit
from eigenpeft.auditing.verdict import choose_n_components
from eigenpeft.errors import SubspaceError
from tests.factories import make_collection, random_factors, write_adapter

MODULES = {"layer.0.query": (60, 80), "layer.1.query": (60, 80)}


def audited(folder, **options):
    return audit(AdapterCollection.from_pretrained(folder), progress=False, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_subspace_is_found_with_its_dimension(tmp_path, seed):
    made = make_collection(tmp_path, n_adapters=10, modules=MODULES, rank=(3, 4), n_shared=6, noise=0.02, seed=seed)
    report = audited(made.folder, n_components=16, seed=seed)
    assert report.verdict == "shared"
    assert report.n_components in (5, 6, 7)
    assert report.held_out.real[5] > 0.9
    assert report.held_out.null[5] < 0.1
    assert max(report.outside.values()) < 0.15
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
    assert set(report.outside) == {*made.names, "half"}


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


def test_choice_of_k():
    assert choose_n_components((0.2, 0.2, 0.2)) == 1
    assert choose_n_components((0.1, 0.5, 0.94, 0.96, 1.0)) == 4
