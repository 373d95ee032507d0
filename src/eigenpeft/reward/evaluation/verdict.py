"""What an evaluation says in words: personalisation pays, does not pay, or it is not known from these users."""

from eigenpeft.reward.evaluation.intervals import Share

# With fewer users asked than this, an interval over users says too little for a verdict.
FEW_USERS = 10
# A difference worth a word: a control that is ahead by so much is named, and a gain that is surely below does not pay.
CLEARLY = 0.01


def verdict(
    known: Share, new: Share, *, n_basis: int, split: str, n_unused: int, personal: dict[str, float], ours: float
) -> str:
    """The findings in a few sentences.

    Args:
        known: Gain over the better of two heads for everybody, for known users on new prompts.
        new: The same for new users.
        n_basis: Size of the basis that was chosen.
        split: What was held out.
        n_unused: Comparisons left out because a text of theirs stands on both sides.
        personal: Accuracy of the other ways to personalise, by name, for known users.
        ours: LoRe's.
    """
    gained = " and ".join(
        f"{100 * share.mean:+.1f} points [{100 * share.low:+.1f}, {100 * share.high:+.1f}] for {who}"
        for share, who in ((known, _users(known, "known")), (new, _users(new, "new")))
    )
    unused = f", {n_unused:,} comparisons left out, whose texts stand on both sides" if n_unused else ""
    return (
        f"{_answer(n_basis, known, new)} Judged on what was held out (by {split}{unused}), against the better of two heads for "
        f"everybody, with a basis of {n_basis}: {gained} (95 % intervals over users).{_better_control(personal, ours)}"
    )


def _users(share: Share, kind: str) -> str:
    return f"{share.n_users} {kind} user{'' if share.n_users == 1 else 's'}"


def _answer(n_basis: int, known: Share, new: Share) -> str:
    few = min(known.n_users, new.n_users)
    if few < FEW_USERS:
        return (
            f"Unknown whether personalisation pays on this data: {known.n_users} known and {new.n_users} new users were asked, and "
            f"fewer than {FEW_USERS} of either say too little about others. Collect comparisons of more users."
        )
    if n_basis == 1:
        return "Personalisation does not pay on this data: held-out comparisons chose one shared head."
    pays = [who for share, who in ((known, "known"), (new, "new")) if share.low > 0]
    if len(pays) == 2:
        return "Personalisation pays on this data, for known and for new users."
    if pays:
        (other,) = {"known", "new"} - set(pays)
        return f"Personalisation pays on this data for {pays[0]} users; for {other} users it is unknown."
    if max(known.high, new.high) < CLEARLY:
        return "Personalisation does not pay on this data: the intervals leave no gain of a point."
    return (
        "Unknown whether personalisation pays on this data: the intervals hold zero, and gains of a point or more. Stay with one "
        "shared head, or collect comparisons of more users."
    )


def _better_control(personal: dict[str, float], ours: float) -> str:
    """A sentence where another way to personalise is clearly ahead of LoRe for known users."""
    if not personal:
        return ""
    best = max(personal, key=lambda name: personal[name])
    if personal[best] < ours + CLEARLY:
        return ""
    return f" For known users {best!r} is better than LoRe, {personal[best]:.3f} against {ours:.3f}."
