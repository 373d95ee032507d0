"""The verdict says from how many users it judges, and "unknown" where these are few or the interval holds zero and a point."""

import pytest
import torch

from eigenpeft.reward.evaluation.intervals import Bootstrap, Share
from eigenpeft.reward.evaluation.verdict import FEW_USERS, verdict


def said(known, new, *, users=(40, 20), n_basis=3):
    shares = [Share(sum(ends) / 2, *ends, n, 10 * n) for ends, n in zip((known, new), users, strict=True)]
    return verdict(*shares, n_basis=n_basis, split="prompts", n_unused=0, personal={"head per user": 0.8}, ours=0.7)


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
    ],
)
def test_gains_and_their_intervals(known, new, start):
    text = said(known, new)
    assert text.startswith(start)
    assert "for 40 known users and" in text
    assert "for 20 new users" in text
    assert text.endswith("For known users 'head per user' is better than LoRe, 0.800 against 0.700.")


@pytest.mark.parametrize("users", [(FEW_USERS - 1, 40), (40, 1)])
@pytest.mark.parametrize("n_basis", [1, 3])
def test_few_users_are_no_ground_for_a_verdict(users, n_basis):
    text = said((0.01, 0.03), (0.01, 0.05), users=users, n_basis=n_basis)
    assert text.startswith("Unknown whether personalisation pays on this data")
    assert f"{users[0]} known and {users[1]} new users were asked" in text


def test_one_shared_head_does_not_pay():
    assert said((0.0, 0.0), (0.0, 0.0), n_basis=1).startswith("Personalisation does not pay on this data: held-out")


def test_one_user_has_no_interval_and_few_have_a_wide_one():
    rows = torch.arange(60) // 10
    margins = torch.randn(60, generator=torch.Generator().manual_seed(1))
    draws = Bootstrap(rows, 6, 1000, 0)
    one = draws.share(margins, rows == 0)
    assert (one.low, one.high, one.n_users) == (0.0, 1.0, 1)
    gain = draws.gain(margins, -margins, rows == 0)
    assert (gain.low, gain.high) == (-1.0, 1.0)
    six = draws.share(margins, rows >= 0)
    of_users = torch.stack([(margins[rows == user] > 0).double().mean() for user in range(6)])
    plain = 1.96 * float(of_users.std(correction=0)) / 6**0.5
    assert six.high - six.low > 2.3 * plain  # 2 x plain is what the plain percentile interval would give
