"""The evaluation: finds the gain where it was planted, and says so where there is none."""

import json

import pytest
import torch

from eigenpeft.errors import RewardModelError
from eigenpeft.report.lore_figure import plot_evaluation
from eigenpeft.reward import LoReFitter, evaluate_lore
from eigenpeft.reward.evaluation.evaluate import QUADRANTS
from eigenpeft.reward.evaluation.simulation import SimulatedUsers

SEEN, NEW = QUADRANTS[1:]


def evaluated(users, *, n_pairs=40, **options):
    pairs = users.pairs(n_pairs, seed=1)
    return evaluate_lore(
        pairs.chosen,
        pairs.rejected,
        user_ids=pairs.user_ids,
        reference_head=users.reference_head,
        true_margins=pairs.true_margins,
        shots=(0, 2, 10),
        n_bootstrap=200,
        **options,
    )


@pytest.fixture(scope="module")
def found():
    users = SimulatedUsers(120, n_features=16, n_basis=3, n_signal=16, shared=0.2, seed=0)
    return evaluated(users, fitter=LoReFitter(n_basis=(1, 3), deviation_scale=2.0))


def test_planted_users_show_in_every_row(found):
    assert found.verdict.startswith("Personalisation pays on this data, for known and for new users")
    accuracy = {method: shares[NEW].mean for method, shares in found.accuracy.items()}
    assert accuracy["oracle"] > accuracy["LoRe"] > accuracy["shared head"] + 0.03
    assert accuracy["LoRe"] > accuracy["head per user, from the shared one"]
    assert set(accuracy) == {
        "reference head",
        "shared head",
        "head per user",
        "head per user, from the shared one",
        "user encoder",
        "LoRe, population",
        "LoRe",
        "oracle",
    }
    assert found.gain_over_shared[NEW].mean == pytest.approx(accuracy["LoRe"] - accuracy["shared head"])
    assert found.gain_over_population[NEW].mean == pytest.approx(accuracy["LoRe"] - accuracy["LoRe, population"])
    assert found.gain[NEW].mean == min(found.gain_over_shared[NEW].mean, found.gain_over_population[NEW].mean)
    assert found.n_basis == 3


def test_probabilities_are_about_what_they_say(found, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    asked = found.accuracy["LoRe"][NEW].n_pairs
    for bins in found.calibration.values():
        assert sum(bins.counts) == asked
        assert bins.error < 0.1
    assert set(found.calibration) == {"shared head", "LoRe, population", "LoRe"}
    plot_evaluation(found, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_curve_rises_from_the_population(found):
    curve = {n: share.mean for n, share in found.few_shot["LoRe"].items()}
    assert list(curve) == [0, 2, 10]
    assert curve[0] == pytest.approx(found.few_shot["shared head"][0].mean, abs=0.03)
    assert curve[10] > curve[0] + 0.03
    assert found.few_shot_gain[10].low > 0


def test_intervals_hold_their_means_and_all_is_json(found):
    for shares in found.accuracy.values():
        assert all(share.low <= share.mean <= share.high for share in shares.values())
    assert json.loads(json.dumps(found.to_dict()))["n_basis"] == 3


@pytest.fixture(scope="module")
def alike():
    """One shared head is chosen, as all users are alike."""
    users = SimulatedUsers(60, n_features=12, n_basis=1, seed=3)
    fitter = LoReFitter(n_basis=(1, 3), deviation_scale=1.0)
    return users, fitter, evaluated(users, n_pairs=30, fitter=fitter)


def test_where_users_agree_nothing_is_said_to_pay(alike):
    users, _, found = alike
    forced = evaluated(users, n_pairs=30, fitter=LoReFitter(n_basis=3, deviation_scale=1.0))
    for one in (found, forced):
        starts = ("Personalisation does not pay on this data", "Unknown whether personalisation pays on this data")
        assert one.verdict.startswith(starts)
    assert forced.best_personal is None


def test_one_shared_head_is_not_compared_with_itself(alike):
    users, fitter, found = alike
    assert found.n_basis == 1
    assert (found.gain[SEEN].mean, found.gain[SEEN].low, found.gain[SEEN].high) == (0, 0, 0)
    best = found.best_personal
    assert best.n_basis == 3
    assert best.gain[SEEN].low <= 0 <= best.gain[SEEN].high
    assert best.gain_over_shared[SEEN].low < best.gain_over_shared[SEEN].high
    assert found.verdict == best.verdict
    assert f"a basis of 3, the best of those above one: {100 * best.gain[SEEN].mean:+.1f} points" in found.verdict
    # The oracle: the same setting, asked for by hand.
    lowest = min((one for one in fitter.candidates_ if one.setting.n_basis > 1), key=lambda one: one.score)
    by_hand = evaluated(
        users, n_pairs=30, fitter=LoReFitter(**vars(lowest.setting), strength=lowest.strength, held_out=0.5)
    )
    assert by_hand.accuracy == best.accuracy
    assert by_hand.few_shot == best.few_shot
    assert json.loads(json.dumps(found.to_dict()))["best_personal"]["n_basis"] == 3


def test_one_shared_head_that_was_asked_for_says_nothing_about_more():
    found = evaluated(SimulatedUsers(40, n_features=4, n_basis=1, seed=3), n_pairs=10, fitter=LoReFitter(n_basis=1))
    assert found.best_personal is None
    assert found.verdict.startswith("Unknown whether personalisation pays on this data: one shared head was asked for")


def test_held_out_prompts_are_held_out_together():
    users = SimulatedUsers(40, n_features=8, n_basis=2, seed=0)
    pairs = users.pairs(20, seed=1)
    found = evaluate_lore(
        pairs.chosen,
        pairs.rejected,
        user_ids=pairs.user_ids,
        prompt_ids=[i % 20 for i in range(800)],
        fitter=LoReFitter(n_basis=2, deviation_scale=1.0, strength=1.0, shared_scale=1.0),
        n_bootstrap=50,
    )
    asked = found.accuracy["LoRe"][SEEN]
    assert asked.n_users == 28
    assert asked.n_pairs % 28 == 0  # whole prompts
    assert "reference head" not in found.accuracy
    assert "oracle" not in found.accuracy


def test_too_little_to_hold_out():
    features = torch.randn(4, 3)
    with pytest.raises(RewardModelError, match="Nothing is left for the part"):
        evaluate_lore(features, -features, user_ids=["a", "a", "b", "b"], held_out_users=0.0)
