"""Very large and very small updates: called diverged, never untrained; cosines stay cosines, and every method fits them."""

import pytest
import torch

from eigenpeft.audit import audit_adapters
from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.adapter import AdapterFactors
from eigenpeft.collection.diagnosis import Diagnosis
from eigenpeft.errors import CollectionError, EigenPeftError
from eigenpeft.linalg.factored import frobenius_norm
from tests.factories import random_factors, write_adapter

MODULES = {"layer.0.q": (12, 20), "layer.0.v": (16, 20)}


def adapters(folder, scales, *, dtype=torch.float32):
    for seed, scale in enumerate(scales):
        pairs = random_factors(seed=seed, modules=MODULES)
        scaled = {name: (B.to(dtype) * scale, A.to(dtype) * scale) for name, (B, A) in pairs.items()}
        write_adapter(folder / f"a{seed}", scaled)
    return AdapterCollection.from_pretrained(folder)


@pytest.mark.parametrize("scale", [1e19, 1e15, 3e36])
def test_a_diverged_adapter_is_called_so(tmp_path, scale):
    findings = adapters(tmp_path, [1, 1, 1, scale]).diagnose(progress=False)
    assert [(each.kind, each.adapters) for each in findings] == [("outlier_norm", ("a3",))]
    assert "may have diverged" in findings[0].message


@pytest.mark.parametrize("scale", [1e-25, 1e-30, 1e-40, 1e-12])
def test_a_tiny_adapter_shares_nobodys_start(tmp_path, scale):
    findings = adapters(tmp_path, [1, 1, 1, scale]).diagnose(progress=False)
    assert not [each for each in findings if each.kind in ("same_start", "near_duplicate", "untrained")]


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1.0, 1e18, 1e36])
def test_cosines_of_equal_adapters_are_one_at_any_size(scale):
    pairs = random_factors(modules={"q": (12, 20)})["q"]
    diagnosis = Diagnosis()
    lora_B, lora_A = (factor.clone() for factor in pairs)
    diagnosis.observe(
        "q", factors=[AdapterFactors("one", lora_A, lora_B), AdapterFactors("two", lora_A * scale, lora_B)]
    )
    found = {each.kind: each.value for each in diagnosis.findings()}
    assert found["same_start"] == pytest.approx(1.0, abs=1e-4)
    assert found["near_duplicate"] == pytest.approx(1.0, abs=1e-4)
    assert max(found["same_start"], found["near_duplicate"]) <= 1.0


@pytest.mark.parametrize("method", ["balanced", "hosvd", "hooi", "eigenlorax"])
@pytest.mark.parametrize("weighting", ["equal", "none"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-25, 1e16])
def test_a_collection_of_any_size_has_the_subspace_of_the_same_one_at_size_one(tmp_path, method, weighting, scale):
    def fitted(scales, folder):
        return (
            SubspaceBuilder(4, method=method, weighting=weighting)
            .fit(adapters(folder, scales, dtype=torch.float64))
            .subspace_
        )

    usual, other = fitted([1.0] * 4, tmp_path / "usual"), fitted([scale] * 4, tmp_path / "other")
    for name in MODULES:
        both = usual[name].components_in @ other[name].components_in.mT
        torch.testing.assert_close(both.abs(), torch.eye(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            usual[name].explained_variance_ratio, other[name].explained_variance_ratio, atol=1e-4, rtol=0
        )


def test_one_diverged_adapter_among_others_is_one_of_them_with_equal_weights(tmp_path):
    builder = SubspaceBuilder(8).fit(adapters(tmp_path, [1, 1, 1, 1e19]))
    assert 0 < builder.subspace_.explained_share <= 1
    assert [each.adapters for each in builder.findings_ if each.kind == "outlier_norm"] == [("a3",)]


def test_singular_values_that_no_file_holds_are_one_error(tmp_path):
    with pytest.raises(EigenPeftError, match="diverged; leave it out, or pass weighting='equal'"):
        SubspaceBuilder(4, method="hosvd", weighting="none").fit(adapters(tmp_path, [1e25] * 3))


def test_float64_factors_whose_squares_overflow_are_one_error(tmp_path):
    with pytest.raises(CollectionError, match="numbers as large as .* it diverged, leave it out"):
        SubspaceBuilder(4).fit(adapters(tmp_path, [1, 1, 1e200], dtype=torch.float64))


def test_norms_are_right_at_any_size():
    lora_B, lora_A = random_factors(modules={"q": (12, 20)})["q"]
    for scale in (1e-40, 1e-20, 1e19):
        expected = float(torch.linalg.matrix_norm((lora_B.double() * scale) @ (lora_A.double() * scale)))
        assert float(frobenius_norm(lora_B.double() * scale, lora_A.double() * scale)) == pytest.approx(
            expected, rel=1e-6
        )


def test_an_audit_looks_at_no_more_components_than_there_can_be(tmp_path):
    report = audit_adapters(adapters(tmp_path, [1, 1, 1]), n_components=10**9, n_nulls=1, progress=False)
    assert len(report.held_out.real) == 12  # three adapters of rank 4
