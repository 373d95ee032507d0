"""Tables of LoRe: standard errors, the chosen setting and its rule; what was held out by its name; no head beside itself."""

import pytest
import torch
from rich.console import Console

from eigenpeft.report.lore_tables import accuracy_table, candidate_table, few_shot_table
from eigenpeft.reward import LoReFitter, SimulatedUsers, evaluate_lore
from eigenpeft.reward.evaluation.verdict import FEW_USERS

SETTINGS = {"n_basis": (1, 3), "deviation_scale": (1.0, 2.0)}


def shown(table):
    console = Console(width=250, record=True)
    console.print(table)
    return console.export_text()


@pytest.fixture(scope="module")
def alike():
    return SimulatedUsers(60, n_features=12, n_basis=1, seed=3).pairs(30, seed=1)


@pytest.mark.parametrize("n_true", [1, 3])
def test_candidates_have_errors_and_the_chosen_one_a_star(n_true):
    pairs = SimulatedUsers(80, n_features=12, n_basis=n_true, n_signal=12, shared=0.2, seed=3).pairs(40, seed=1)
    fitter = LoReFitter(**SETTINGS, concentration=1.0).fit(pairs.chosen, pairs.rejected, user_ids=pairs.user_ids)
    assert fitter.model_.n_basis == n_true
    text = shown(candidate_table(fitter))
    (starred,) = [line for line in text.splitlines() if "│" in line and "* " in line]
    assert f"* {n_true} │" in starred
    for one in fitter.candidates_:
        assert f"{one.score:.4f} ± {one.score_error:.4f}" in text
        assert f"{100 * one.seen_accuracy:.1f} ± {100 * one.seen_accuracy_error:.1f} %" in text
    lowest = min(fitter.candidates_, key=lambda one: one.score)
    (chosen,) = [one for one in fitter.candidates_ if f"{one.score:.4f}" in starred]
    excess, error = chosen.worse_than(lowest)
    assert excess <= (2 if n_true == 1 else 1) * error  # the rule, as the line below the table says it
    if chosen is not lowest:
        assert f"{excess:.4f} ± {error:.4f}" in starred
    assert "the smallest basis within one standard error of the lowest loss (one shared head: within two)" in " ".join(
        text.split()
    )


@pytest.mark.parametrize("by", ["texts", "prompts", "comparisons"])
def test_what_was_held_out_has_its_name(alike, by):
    rows = torch.arange(len(alike.chosen))
    options = {
        "user_ids": alike.user_ids,
        "prompt_ids": (rows % 30).tolist() if by == "prompts" else None,
        "fitter": LoReFitter(**SETTINGS, shared_scale=1.0, strength=1.0, concentration=1.0),
        "n_bootstrap": 20,
        "shots": (0, 2),
    }
    # Forty texts that stand in many comparisons, or texts that each stand in one.
    pairs = (
        torch.stack([rows * 7 % 40, (rows * 7 + 1 + rows % 38) % 40]) if by == "texts" else torch.stack([rows, rows])
    )
    chosen, rejected = alike.chosen[pairs[0]], (alike.chosen if by == "texts" else alike.rejected)[pairs[1]]
    found = evaluate_lore(chosen, rejected, **options)
    assert found.split == by
    text = shown(accuracy_table(found)) + shown(few_shot_table(found))
    assert f"known users, new {by}" in text
    assert f"new users, new {by}" in text
    assert f"New users by number of comparisons, on new {by}" in text
    assert by == "prompts" or "prompt" not in text


def test_one_shared_head_stands_beside_the_best_basis_above_one(alike):
    fitter = LoReFitter(**SETTINGS, shared_scale=4.0, strength=1.0, concentration=1.0)
    found = evaluate_lore(
        alike.chosen, alike.rejected, user_ids=alike.user_ids, fitter=fitter, n_bootstrap=50, shots=(0, 2)
    )
    assert found.n_basis == 1
    text = shown(accuracy_table(found))
    assert "LoRe is a basis of 3, the best of those above one: the fit chose one shared head" in " ".join(text.split())
    (gains,) = [line for line in text.splitlines() if "gain over the shared head" in line]
    assert "+0.000 [+0.000, +0.000]" not in gains
    seen = found.best_personal.gain_over_shared["seen users, new prompts"]
    assert f"{seen.mean:+.3f} [{seen.low:+.3f}, {seen.high:+.3f}]" in gains
    table = shown(few_shot_table(found))
    assert "LoRe, basis of 3" in table
    asked = found.best_personal.few_shot_gain[2].n_users
    assert f"│ {asked} │" in " ".join(table.split())
    assert ("too few users" in table) == ("give more of each user" in " ".join(table.split())) == (asked < FEW_USERS)
