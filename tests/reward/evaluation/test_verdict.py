"""The verdict says from how many users it judges, and "unknown" where these are few or the interval holds zero and a point."""

import pytest
import torch

from eigenpeft.reward.evaluation.intervals import Bootstrap, Share
from eigenpeft.reward.evaluation.verdict import FEW_USERS, verdict


def made_share(ends, *, n_users):
    return Share(mean=sum(ends) / 2, low=ends[0], high=ends[1], n_users=n_users, n_pairs=10 * n_users)


def said(known, new, *, users=(40, 20), n_basis=3, chosen=3, other=(0.06, 0.14)):
    shares = [made_share(ends, n_users=n) for ends, n in zip((known, new), users, strict=True)]
    control = ("head per user", made_share(other, n_users=users[0]))
    return verdict(*shares, n_basis=n_basis, chosen=chosen, split="prompts", n_unused=0, other=control)


@pytest.mark.parametrize(
    ("known", "new", "start"),
    [
        ((0.01, 0.03), (0.01, 0.05), "Personalisation pays on this data, for known and for new users."),
        (
            (0.01, 0.03),
            (-0.01, 0.05),
            "Personalisation pays on this data for known users; for new users it is unknown.",
        ),
        (
            (-0.01, 0.03),
            (0.01, 0.05),
            "Personalisation pays on this data for new users; for known users it is unknown.",
        ),
        ((-0.01, 0.03), (-0.01, 0.05), "Unknown whether personalisation pays on this data: the intervals hold zero"),
        ((-0.01, 0.005), (-0.02, 0.009), "Personalisation does not pay on this data: the intervals leave no gain"),
        (
            (-0.04, -0.01),
            (-0.02, 0.03),
            "Unknown whether personalisation pays on this data: for known users it predicts worse than one shared",
        ),
    ],
)
def test_gains_and_their_intervals(known, new, start):
    text = said(known, new)
    assert text.startswith(start)
    assert "for 40 known users and" in text
    assert "for 20 new users" in text
    assert " For known users 'head per user' is ahead of LoRe by +10.0 points [+6.0, +14.0]." in text
    assert text.endswith("so try two more before you rely on it.")


def test_another_way_that_is_ahead_has_its_interval_too():
    assert "'head per user' is ahead of LoRe by +2.0 points [-2.0, +6.0], which may be chance." in said(
        (0.01, 0.03), (0.01, 0.05), other=(-0.02, 0.06)
    )
    assert "head per user" not in said((0.01, 0.03), (0.01, 0.05), other=(-0.06, 0.06))


@pytest.mark.parametrize("users", [(FEW_USERS - 1, 40), (40, 1)])
@pytest.mark.parametrize("chosen", [1, 3])
def test_few_users_are_no_ground_for_a_verdict(users, chosen):
    text = said((0.01, 0.03), (0.01, 0.05), users=users, chosen=chosen)
    assert text.startswith("Unknown whether personalisation pays on this data")
    assert f"{users[0]} known and {users[1]} new users were asked" in text


@pytest.mark.parametrize(
    ("known", "new", "start"),
    [
        (
            (-0.035, 0.058),
            (-0.05, 0.09),
            "Unknown whether personalisation pays on this data: no personalisation was found that surely predicts better than one "
            "shared head, which the fit chose, but the intervals hold zero, and gains of a point or more.",
        ),
        (
            (-0.01, 0.005),
            (-0.02, 0.009),
            "Personalisation does not pay on this data: the intervals leave no gain of a point. The fit chose one shared head",
        ),
        (
            (0.01, 0.03),
            (0.01, 0.05),
            "Personalisation pays on this data, for known and for new users. The fit itself chose one shared head; ask for a",
        ),
        (
            (0.01, 0.03),
            (-0.01, 0.05),
            "Personalisation pays on this data for known users; for new users it is unknown. The fit itself chose one shared head;",
        ),
    ],
)
def test_one_shared_head_is_judged_by_the_best_basis_above_one(known, new, start):
    text = said(known, new, chosen=1)
    assert text.startswith(start)
    assert f"a basis of 3, the best of those above one: {100 * sum(known) / 2:+.1f} points" in text


def test_users_who_all_rank_alike_are_said_to():
    assert "(95 % intervals over users). No user's own weights put any of these comparisons" in said((0, 0), (0, 0))
    assert "No user's own weights" not in said((0, 0.001), (0, 0))


def test_one_shared_head_alone_is_not_compared_with_itself():
    text = said((0.0, 0.0), (0.0, 0.0), n_basis=1, chosen=1)
    assert text.startswith("Unknown whether personalisation pays on this data: one shared head was asked for")
    assert "points" not in text
    # Two users: the fit had one of them, and could not take more than one row.
    few = said((0.0, 0.0), (0.0, 0.0), users=(1, 1), n_basis=1, chosen=1)
    assert few.startswith("Unknown whether personalisation pays on this data: 1 known and 1 new users were asked")
    assert "asked for" not in few
    assert "points" not in few


def test_one_user_has_no_interval_and_few_have_a_wide_one():
    rows = torch.arange(60) // 10
    margins = torch.randn(60, generator=torch.Generator().manual_seed(1))
    draws = Bootstrap(rows, n_users=6, n_bootstrap=1000, seed=0)
    one = draws.share(margins, mask=rows == 0)
    assert (one.low, one.high, one.n_users) == (0.0, 1.0, 1)
    gain = draws.gain(margins, others=-margins, mask=rows == 0)
    assert (gain.low, gain.high) == (-1.0, 1.0)
    six = draws.share(margins, mask=rows >= 0)
    of_users = torch.stack([(margins[rows == user] > 0).double().mean() for user in range(6)])
    plain = 1.96 * float(of_users.std(correction=0)) / 6**0.5
    assert six.high - six.low > 2.3 * plain  # 2 x plain is what the plain percentile interval would give
