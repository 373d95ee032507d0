"""What an evaluation says in words: personalisation pays, does not pay, or it is not known from these users."""

from eigenpeft.reward.evaluation.intervals import Share

# With fewer users asked than this, an interval over users says too little for a verdict.
FEW_USERS = 10
# A difference worth a word: a control that is ahead by so much is named, and a gain that is surely below does not pay.
CLEARLY = 0.01
_ANOTHER_SEED = (
    "These intervals are over the users of one split: another seed leaves out other users and texts and may say otherwise, so try "
    "two more before you rely on it."
)


def verdict(
    known: Share, new: Share, *, n_basis: int, chosen: int, split: str, n_unused: int, other: tuple[str, Share]
) -> str:
    """The findings in a few sentences.

    Args:
        known: Gain over the better of two heads for everybody, for known users on what was held out.
        new: The same for new users.
        n_basis: Size of the basis that is judged.
        chosen: Size of the basis that the fit chose: another one where it chose one shared head, and the best basis of several
            rows is judged in its place.
        split: What was held out.
        n_unused: Comparisons left out because a text of theirs stands on both sides.
        other: Name of the best of the other ways to personalise, and its gain over LoRe for known users.
    """
    if n_basis == 1 and min(known.n_users, new.n_users) < FEW_USERS:
        return _too_few(known, new)
    if n_basis == 1:
        return (
            "Unknown whether personalisation pays on this data: one shared head was asked for, the same for all users, and "
            "no basis of several rows was compared with it. Leave the size of the basis to the fit, or ask for one above 1."
        )
    gained = " and ".join(
        f"{_points(share)} for {who}" for share, who in ((known, _users(known, "known")), (new, _users(new, "new")))
    )
    unused = f", {n_unused:,} comparisons left out, whose texts stand on both sides" if n_unused else ""
    basis = f"a basis of {n_basis}" + (", the best of those above one" if chosen == 1 else "")
    same = (
        " No user's own weights put any of these comparisons the other way round."
        if all(end == 0 for share in (known, new) for end in (share.low, share.high))
        else ""
    )
    return (
        f"{_answer(n_basis, chosen, known, new)} Judged on what was held out (by {split}{unused}), against the better of two "
        f"heads for everybody, with {basis}: {gained} (95 % intervals over users).{same}{_better_control(*other)} {_ANOTHER_SEED}"
    )


def _users(share: Share, kind: str) -> str:
    return f"{share.n_users} {kind} user{'' if share.n_users == 1 else 's'}"


def _points(share: Share) -> str:
    return f"{100 * share.mean:+.1f} points [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"


def _too_few(known: Share, new: Share) -> str:
    return (
        f"Unknown whether personalisation pays on this data: {known.n_users} known and {new.n_users} new users were asked, and "
        f"fewer than {FEW_USERS} of either say too little about others. Collect comparisons of more users."
    )


def _answer(n_basis: int, chosen: int, known: Share, new: Share) -> str:
    if min(known.n_users, new.n_users) < FEW_USERS:
        return _too_few(known, new)
    pays = [who for share, who in ((known, "known"), (new, "new")) if share.low > 0]
    if pays:
        # What the fit chose by fewer comparisons is not what these say.
        unchosen = f" The fit itself chose one shared head; ask for a basis of {n_basis}." if chosen == 1 else ""
        if len(pays) == 2:
            return "Personalisation pays on this data, for known and for new users." + unchosen
        (other,) = {"known", "new"} - set(pays)
        return f"Personalisation pays on this data for {pays[0]} users; for {other} users it is unknown.{unchosen}"
    if max(known.high, new.high) < CLEARLY:
        return "Personalisation does not pay on this data: the intervals leave no gain of a point." + (
            " The fit chose one shared head, the same for all users." if chosen == 1 else ""
        )
    worse = [who for share, who in ((known, "known"), (new, "new")) if share.high < 0]
    if worse:
        (other,) = {"known", "new"} - set(worse)  # both below zero would not pay
        return (
            f"Unknown whether personalisation pays on this data: for {worse[0]} users it predicts worse than one shared head, and "
            f"for {other} users a gain of a point or more is possible. Stay with one shared head, or collect comparisons of more "
            "users."
        )
    found = (
        "no personalisation was found that surely predicts better than one shared head, which the fit chose, but the"
        if chosen == 1
        else "the"
    )
    return (
        f"Unknown whether personalisation pays on this data: {found} intervals hold zero, and gains of a point or more. Stay with "
        "one shared head, or collect comparisons of more users."
    )


def _better_control(name: str, gain: Share) -> str:
    """A sentence where another way to personalise is ahead of LoRe for known users by a point or more."""
    if gain.mean < CLEARLY:
        return ""
    chance = "" if gain.low > 0 else ", which may be chance"
    return f" For known users {name!r} is ahead of LoRe by {_points(gain)}{chance}."
