"""Findings about the tensors: each rule fires where it should and nowhere else."""

import math

import pytest
import torch

from eigenpeft.collection import AdapterCollection, AdapterFactors, Diagnosis
from tests.factories import MODULES, make_collection, random_factors, write_adapter

WIDE = {f"layer.{i}.query": (160, 200) for i in range(6)}


def diagnose(adapters):
    """Findings of `{name: {module: (lora_B, lora_A)}}`, and the diagnosis itself."""
    diagnosis = Diagnosis()
    for module in sorted({module for factors in adapters.values() for module in factors}):
        having = [(name, factors[module]) for name, factors in adapters.items() if module in factors]
        diagnosis.observe(module, factors=[AdapterFactors(name, lora_A=A, lora_B=B) for name, (B, A) in having])
    return diagnosis.findings(), diagnosis


def kinds(adapters):
    return [(finding.kind, finding.adapters) for finding in diagnose(adapters)[0]]


def scaled(factors, factor):
    return {module: (factor * B, A) for module, (B, A) in factors.items()}


def healthy(n, *, modules=WIDE, rank=4):
    return {f"a{i}": random_factors(modules=modules, rank=rank, seed=i) for i in range(n)}


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("modules", [MODULES, WIDE])
def test_independent_adapters_raise_nothing(n, modules):
    assert kinds(healthy(n, modules=modules)) == []


def test_in_parts_it_finds_the_same():
    """With norms known beforehand and factors looked at once, as `SubspaceBuilder` does it."""
    adapters = healthy(4)
    adapters["zero"] = scaled(random_factors(modules=WIDE, seed=9), 0.0)
    adapters["twin"] = scaled(adapters["a1"], 1.01)
    adapters["huge"] = scaled(random_factors(modules=WIDE, seed=8), 1000.0)
    parts, n_compared = Diagnosis(), 0
    for module in WIDE:
        read = [AdapterFactors(name, lora_A=own[module][1], lora_B=own[module][0]) for name, own in adapters.items()]
        parts.observe_norms(
            list(adapters), norms=[float((each.lora_B.double() @ each.lora_A.double()).norm()) for each in read]
        )
        if parts.compares(list(adapters)):
            n_compared += 1
            parts.compare(iter(read))
    assert n_compared == 4 < len(WIDE)
    whole = diagnose(adapters)[0]
    assert [(f.kind, f.adapters) for f in parts.findings()] == [(f.kind, f.adapters) for f in whole]
    assert {f.kind for f in whole} == {"untrained", "outlier_norm", "same_start", "near_duplicate"}


def test_nothing_observed():
    assert Diagnosis().findings() == ()


def test_norms_are_those_of_the_whole_update():
    adapters = healthy(3, modules=MODULES)
    for name, factors in adapters.items():
        squares = sum(float((B.double() @ A.double()).square().sum()) for B, A in factors.values())
        assert diagnose(adapters)[1].norms[name] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_untrained_means_zero_in_every_module():
    adapters = healthy(3)
    adapters["zero-B"] = scaled(random_factors(modules=WIDE, seed=8), 0.0)
    adapters["zero-A"] = {module: (B, 0 * A) for module, (B, A) in random_factors(modules=WIDE, seed=9).items()}
    adapters["partly"] = random_factors(modules=WIDE, seed=10) | {
        "layer.0.query": (torch.zeros(160, 4), torch.ones(4, 200))
    }
    assert kinds(adapters) == [("untrained", ("zero-B",)), ("untrained", ("zero-A",))]


@pytest.mark.parametrize(
    ("factors", "outliers"),
    [
        ([1, 1, 1, 1, 9], []),  # not ten times
        ([1, 1, 1, 1, 12], ["a4"]),
        ([1, 12], []),  # two adapters have no majority
        ([1, 1, 12], ["a2"]),
        ([0.01, 0.1, 1, 10, 100], []),  # a wide spread of its own
        ([0.5, 1, 1, 1, 2, 1e4], ["a5"]),
        ([1, 1, 1, 1, 1e-4], []),  # a small one spoils nothing
        ([1, 1, 1, 1, 1, 50, 5000], ["a5", "a6"]),  # one does not hide the other
    ],
)
def test_outlier_norm(factors, outliers):
    adapters = healthy(len(factors))
    adapters = {name: scaled(adapters[name], factor) for name, factor in zip(adapters, factors, strict=True)}
    assert [names[0] for kind, names in kinds(adapters) if kind == "outlier_norm"] == outliers
    assert {kind for kind, _ in kinds(adapters)} <= {"outlier_norm"}


def with_start(start, *, seed, drift):
    """Adapters that begin at the lora_A of `start`, drift away from it, and have a lora_B of their own."""
    own = random_factors(modules=WIDE, seed=seed)
    return {module: (own[module][0], start[module][1] + drift * own[module][1]) for module in start}


def test_same_start_groups():
    adapters = healthy(3)
    for i, base in enumerate(("a0", "a0", "a2")):
        adapters[f"b{i}"] = with_start(adapters[base], seed=20 + i, drift=0.5)
    findings, _ = diagnose(adapters)
    assert [(found.kind, found.adapters) for found in findings] == [
        ("same_start", ("a0", "b0", "b1")),
        ("same_start", ("a2", "b2")),
    ]
    # cos of a and a + n/2 is 1/sqrt(1.25); of two such, 1/1.25.
    assert findings[0].value == pytest.approx((2 / 1.25**0.5 + 1 / 1.25) / 3, abs=0.03)
    assert findings[1].value == pytest.approx(1 / 1.25**0.5, abs=0.03)


def test_a_start_that_was_left_behind_is_no_same_start():
    adapters = healthy(2)
    adapters["far"] = with_start(adapters["a0"], seed=20, drift=3.0)
    assert kinds(adapters) == []


def test_near_duplicates_do_not_depend_on_how_the_update_is_split():
    adapters = healthy(3)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    adapters["turned"] = {module: (B @ turn.mT, turn @ A) for module, (B, A) in adapters["a1"].items()}
    findings, _ = diagnose(adapters)
    duplicates = [found for found in findings if found.kind == "near_duplicate"]
    assert [found.adapters for found in duplicates] == [("a1", "turned")]
    assert duplicates[0].value == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("drift", "found"), [(0.2, True), (0.4, True), (0.6, False), (1.0, False)])
def test_near_duplicate_threshold(drift, found):
    # Only lora_B drifts: cos of the updates is about 1 / sqrt(1 + drift²), 0.93 at 0.4 and 0.86 at 0.6.
    adapters = healthy(4)
    noise = random_factors(modules=WIDE, seed=99)
    adapters["later"] = {module: (B + drift * noise[module][0], A) for module, (B, A) in adapters["a0"].items()}
    assert (("near_duplicate", ("a0", "later")) in kinds(adapters)) == found


def test_sketched_cosines_are_close_to_the_exact_ones():
    # A rank-one update is the worst case for the sketch; modules are far wider than it.
    modules = {f"layer.{i}": (700, 900) for i in range(4)}
    adapters = healthy(2, modules=modules, rank=1)
    adapters["later"] = {module: (B + 0.3 * torch.roll(B, 1, 0), A) for module, (B, A) in adapters["a0"].items()}
    exact = []
    for module, (B, A) in adapters["later"].items():
        first = adapters["a0"][module][0] @ adapters["a0"][module][1]
        exact.append(float(torch.nn.functional.cosine_similarity(first.flatten(), (B @ A).flatten(), dim=0)))
    findings, _ = diagnose(adapters)
    duplicate = next(found for found in findings if found.kind == "near_duplicate")
    assert duplicate.value == pytest.approx(sum(exact) / len(exact), abs=0.03)


def test_ranks_may_differ_and_modules_be_missing():
    adapters = healthy(3) | {"r8": random_factors(modules=WIDE, rank=8, seed=30)}
    adapters["one"] = {"layer.5.query": random_factors(modules=WIDE, seed=31)["layer.5.query"]}
    adapters["copy"] = {"layer.5.query": adapters["one"]["layer.5.query"]}
    # Modules that come late are compared where an adapter has not been compared often enough.
    assert set(kinds(adapters)) == {("same_start", ("one", "copy")), ("near_duplicate", ("one", "copy"))}


def test_order_of_observation_does_not_change_the_findings():
    adapters = healthy(3)
    adapters["copy"] = adapters["a1"]
    again = dict(reversed(adapters.items()))
    assert {(kind, frozenset(names)) for kind, names in kinds(adapters)} == {
        (kind, frozenset(names)) for kind, names in kinds(again)
    }


def test_diagnose_tells_headers_and_tensors(tmp_path):
    make_collection(tmp_path, n_adapters=3)
    write_adapter(tmp_path / "query", scaled(random_factors(modules={"layer.0.query": (12, 20)}), 0.0))
    findings = AdapterCollection.from_pretrained(tmp_path).diagnose(progress=False)
    assert [(finding.kind, finding.adapters) for finding in findings] == [
        ("missing_modules", ("query",)),
        ("untrained", ("query",)),
    ]
