"""The fitter: finds planted users, chooses the size by held-out comparisons, says what it cannot do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.reward import LoReFitter
from eigenpeft.reward.artifact.pairs import difference_chunks
from eigenpeft.reward.evaluation.simulation import SimulatedUsers

FIXED = {"n_basis": 3, "shared_scale": 2.0, "deviation_scale": 2.0, "concentration": 1.0, "strength": 1.0}


@pytest.fixture(scope="module")
def users():
    return SimulatedUsers(80, n_features=24, n_basis=3, n_signal=24, seed=0)


@pytest.fixture(scope="module")
def train(users):
    return users.pairs(40, seed=1, users=range(60))


@pytest.fixture(scope="module")
def test(users):
    return users.pairs(40, seed=2)


@pytest.fixture(scope="module")
def fitted(train, users):
    return LoReFitter(**FIXED).fit(
        train.chosen, train.rejected, user_ids=train.user_ids, reference_head=users.reference_head
    )


def accuracy(model, pairs, **options):
    right = model.rewards(pairs.chosen, pairs.user_ids, **options) > model.rewards(
        pairs.rejected, pairs.user_ids, **options
    )
    return right.float().mean().item()


def test_beats_the_reference_and_the_shared_head_on_new_comparisons(fitted, users, train, test):
    shared = LoReFitter(n_basis=1).fit(train.chosen, train.rejected, user_ids=train.user_ids)
    seen = users.pairs(40, seed=3, users=range(60))
    reference = ((seen.chosen - seen.rejected) @ users.reference_head > 0).float().mean().item()
    oracle = (seen.true_margins > 0).float().mean().item()
    assert accuracy(fitted.model_, seen) > max(reference, accuracy(shared.model_, seen)) + 0.05
    assert accuracy(fitted.model_, seen) > oracle - 0.05
    assert fitted.model_.n_basis == 3
    assert len(fitted.model_.users) == 60
    assert fitted.candidates_ == []


def test_recovers_the_planted_span(fitted, users):
    assert principal_angles(fitted.model_.reward_basis, users.reward_basis).max() < 0.4


def test_new_users_by_a_few_comparisons(fitted, users):
    new = range(60, 80)
    queries = users.pairs(100, seed=5, users=new)
    before = accuracy(fitted.model_, queries, unknown="population")
    few = users.pairs(20, seed=4, users=new)
    assert fitted.fit_users(few.chosen, few.rejected, user_ids=few.user_ids) is fitted
    assert accuracy(fitted.model_, queries) > before + 0.025
    for user in new:
        fitted.model_.remove_user(f"user-{user}")


def test_the_size_is_chosen_by_held_out_comparisons(train, users):
    fitter = LoReFitter(n_basis=(1, 3), deviation_scale=2.0).fit(
        train.chosen, train.rejected, user_ids=train.user_ids, prompt_ids=range(len(train.chosen))
    )
    assert [candidate.setting.n_basis for candidate in fitter.candidates_] == [1, 3, 3, 3]
    assert fitter.model_.n_basis == 3
    assert fitter.model_.info["strength"] in (0.3, 1.0, 3.0)
    assert fitter.candidates_[1].score < fitter.candidates_[0].score
    assert fitter.chosen_ is min(fitter.candidates_[1:], key=lambda one: one.score)
    assert [one["chosen"] for one in fitter.model_.info["candidates"]] == [
        one is fitter.chosen_ for one in fitter.candidates_
    ]
    for one in fitter.candidates_:
        losses = one.losses.double().numpy()
        assert one.score_error == pytest.approx(losses.std(ddof=1) / len(losses) ** 0.5, rel=1e-5)
        worse = losses - fitter.chosen_.losses.double().numpy()
        assert one.worse_than(fitter.chosen_) == pytest.approx(
            (worse.mean(), worse.std(ddof=1) / len(worse) ** 0.5), rel=1e-4, abs=1e-7
        )
        right = one.seen_accuracy * one.n_seen
        assert right == pytest.approx(round(2 * right) / 2, abs=1e-3)
        assert one.seen_accuracy_error == pytest.approx(
            (one.seen_accuracy * (1 - one.seen_accuracy) / one.n_seen) ** 0.5
        )


def test_where_all_agree_one_head_is_chosen():
    alike = SimulatedUsers(40, n_features=12, n_basis=1, seed=3)
    pairs = alike.pairs(30, seed=4)
    fitter = LoReFitter(n_basis=(1, 3)).fit(pairs.chosen, pairs.rejected, user_ids=pairs.user_ids)
    assert fitter.model_.n_basis == 1
    assert torch.equal(fitter.model_.user_weights(["user-0"]), torch.ones(1, 1))


def test_same_seed_same_model_and_order_of_restarts(train):
    def fit(**options):
        fitter = LoReFitter(**{**FIXED, **options})
        return fitter.fit(train.chosen, train.rejected, user_ids=train.user_ids).model_

    assert torch.equal(fit(seed=3).reward_basis, fit(seed=3).reward_basis)
    assert not torch.equal(fit(seed=3).reward_basis, fit(seed=4).reward_basis)
    assert fit(n_restarts=2).info["converged"]


def test_leading_directions_keep_the_reference_whole(train, users, test):
    """What lies outside the directions kept comes from the reference alone."""
    fitter = LoReFitter(**FIXED, n_components=12).fit(
        train.chosen, train.rejected, user_ids=train.user_ids, reference_head=users.reference_head
    )
    heads = fitter.model_.reward_basis
    differences = heads - heads.mean(dim=0)
    assert torch.linalg.matrix_rank(differences, rtol=1e-4) <= 2
    assert accuracy(fitter.model_, users.pairs(40, seed=3, users=range(60))) > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_may_lie_in_a_file(dtype, train, tmp_path):
    train = replace(train, chosen=train.chosen.to(dtype), rejected=train.rejected.to(dtype))
    expected = LoReFitter(**FIXED).fit(train.chosen, train.rejected, user_ids=train.user_ids).model_.reward_basis
    for name, side in (("chosen", train.chosen), ("rejected", train.rejected)):
        np.save(tmp_path / f"{name}.npy", side.numpy())
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("chosen", "rejected")]
    found = LoReFitter(**FIXED).fit(*mapped, user_ids=train.user_ids).model_.reward_basis
    assert torch.equal(found, expected)
    table = Dataset.from_dict({"chosen": train.chosen.numpy(), "rejected": train.rejected.numpy()}).with_format("numpy")
    found = LoReFitter(**FIXED).fit(table["chosen"], table["rejected"], user_ids=train.user_ids).model_.reward_basis
    assert torch.equal(found, expected)


def test_values_whose_sum_overflows_are_fine_and_nan_is_found():
    large = torch.full((4, 3), 3e38)
    assert sum(len(part) for _, part in difference_chunks(large, torch.zeros(4, 3))) == 4
    large[2, 1] = float("nan")
    with pytest.raises(RewardModelError, match="pair 2 are NaN"):
        list(difference_chunks(large, torch.zeros(4, 3)))


def test_parts_cover_every_pair_once(monkeypatch):
    monkeypatch.setattr("eigenpeft.reward.artifact.pairs.CHUNK_BYTES", 4 * 5 * 7)
    chosen = torch.arange(100.0).view(20, 5)
    parts = list(difference_chunks(chosen, torch.zeros(20, 5)))
    assert torch.equal(torch.cat([part for _, part in parts]), chosen)
    assert [start for start, _ in parts] == [0, 1, 8, 15]


def test_one_user():
    alone = SimulatedUsers(1, n_features=6, n_basis=1, seed=0).pairs(50, seed=1)
    fitter = LoReFitter().fit(alone.chosen, alone.rejected, user_ids=alone.user_ids)
    assert fitter.model_.n_basis == 1
    with pytest.raises(RewardModelError, match="n_basis=2 must be from 1 to the number of users, 1 here"):
        LoReFitter(n_basis=2).fit(alone.chosen, alone.rejected, user_ids=alone.user_ids)


def test_contradictory_answers_leave_the_reference():
    pairs = SimulatedUsers(6, n_features=6, n_basis=2, seed=0).pairs(20, seed=1)
    both = torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.rejected, pairs.chosen])
    model = LoReFitter(n_basis=2, deviation_scale=1.0, strength=1.0).fit(*both, user_ids=pairs.user_ids * 2).model_
    probabilities = model.preference_probability(*both, user_ids=pairs.user_ids * 2)
    assert (probabilities - 0.5).abs().mean() < 0.1


def test_prune_drops_rows_nobody_uses(train):
    model = LoReFitter(
        n_basis=8, deviation_scale=2.0, strength=1.0, prune=0.999, shared_scale=2.0, concentration=1.0
    ).fit(train.chosen, train.rejected, user_ids=train.user_ids)
    assert 1 <= model.model_.n_basis < 8
    assert torch.allclose(model.model_.user_weights(["user-0"]).sum(), torch.tensor(1.0))


def test_a_wrong_reference_is_dropped(train, users):
    model = (
        LoReFitter(n_basis=1)
        .fit(train.chosen, train.rejected, user_ids=train.user_ids, reference_head=-users.reference_head)
        .model_
    )
    seen = users.pairs(40, seed=3, users=range(60))
    assert accuracy(model, seen) > 0.6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_basis": 0}, "n_basis=0 must be from 1"),
        ({"deviation_scale": 0.0}, "deviation_scale=0.0 must be positive"),
        ({"shared_scale": 0.0}, "shared_scale=0.0 must be positive"),
        ({"concentration": -1.0}, "concentration=-1.0 must be positive"),
        ({"strength": 0.0}, "strength=0.0 must be positive"),
        ({"n_restarts": 0}, "n_restarts=0 must be positive"),
        ({"max_iter": 0}, "max_iter=0 must be positive"),
        ({"held_out": 1.0}, "held_out=1.0 must be a share"),
        ({"prune": 1.0}, "prune=1.0 must be 0 or a weight below 1"),
        ({"n_components": 25}, "n_components=25 must be from 1 to the 24 features"),
        ({"n_components": 0}, "n_components=0 must be None or a whole number of at least 1"),
        ({"n_restarts": 1.5}, "n_restarts=1.5 must be a whole number"),
        ({"max_iter": 2.5}, "max_iter=2.5 must be a whole number"),
        ({"seed": "first"}, "seed='first' must be a whole number"),
        ({"n_basis": "many"}, r"n_basis='many' must be a whole number such as 5, several of them, or \"auto\""),
        ({"deviation_scale": "wide"}, "deviation_scale='wide' must be a positive number, several of them"),
        ({"deviation_scale": []}, r"deviation_scale=\[\] must be positive"),
    ],
)
def test_settings_that_cannot_be(options, match, train):
    with pytest.raises(RewardModelError, match=match):
        LoReFitter(**options).fit(train.chosen, train.rejected, user_ids=train.user_ids)


def test_data_that_cannot_be(train, users):
    fitter, ids = LoReFitter(**FIXED), train.user_ids
    with pytest.raises(RewardModelError, match="call fit on the known users"):
        LoReFitter().fit_users(train.chosen, train.rejected, user_ids=ids)
    with pytest.raises(RewardModelError, match="There are no comparisons"):
        fitter.fit(train.chosen[:0], train.rejected[:0], user_ids=[])
    with pytest.raises(RewardModelError, match="2400 user_ids for 2399 pairs"):
        fitter.fit(train.chosen[1:], train.rejected[1:], user_ids=ids)
    with pytest.raises(RewardModelError, match="1 prompt_ids for 2400 pairs"):
        fitter.fit(train.chosen, train.rejected, user_ids=ids, prompt_ids=[1])
    with pytest.raises(RewardModelError, match="2400 chosen but 2399 rejected"):
        fitter.fit(train.chosen, train.rejected[1:], user_ids=ids)
    with pytest.raises(RewardModelError, match=r"reference_head of shape \(3,\) must be \(24,\)"):
        fitter.fit(train.chosen, train.rejected, user_ids=ids, reference_head=torch.ones(3))
    with pytest.raises(RewardModelError, match="are equal in every pair"):
        fitter.fit(train.chosen, train.chosen, user_ids=ids)
    broken = train.chosen.clone()
    broken[7, 0] = float("inf")
    with pytest.raises(RewardModelError, match="pair 7 are NaN or infinite"):
        fitter.fit(broken, train.rejected, user_ids=ids)
