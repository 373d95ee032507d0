"""The encoder control: learns two kinds of users, reads a new one, and is the shared head where it has nothing to read."""

import torch

from eigenpeft.reward.evaluation.user_encoder import encoded_heads


def two_kinds(*, n_users=80, n_pairs=20, n_features=6, seed=0):
    """Users who want the first feature large or small, all of whom want the second large."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n_users).repeat_interleave(n_pairs)
    kinds = torch.where(torch.arange(n_users) % 2 == 0, 3.0, -3.0)
    differences = torch.randn(len(rows), n_features, generator=generator)
    margins = kinds[rows] * differences[:, 0] + 2.0 * differences[:, 1]
    signs = torch.where(torch.rand(len(rows), generator=generator) < torch.sigmoid(margins), 1.0, -1.0)
    return differences * signs[:, None], rows, kinds


def test_tells_kinds_of_users_apart_that_it_never_saw():
    differences, rows, kinds = two_kinds()
    shared = torch.tensor([0.0, 2.0, 0, 0, 0, 0])
    new = rows >= 60
    later = torch.arange(len(rows)) % 20 >= 15
    heads = encoded_heads(differences, rows, train=~new & ~later, fitted=~later, shared=shared, n_users=80, seed=0)
    assert (heads[60:, 0].sign() == kinds[60:].sign()).float().mean() > 0.85
    asked = new & later
    personal, common = ((differences * head).sum(dim=1)[asked] > 0 for head in (heads[rows], shared))
    assert personal.float().mean() > common.float().mean() + 0.1


def test_without_history_it_is_the_shared_head():
    differences, rows, _ = two_kinds(n_users=40)
    shared = torch.tensor([0.5, 2.0, 0, 0, 0, 0])
    fitted = rows < 30
    heads = encoded_heads(differences, rows, train=fitted, fitted=fitted, shared=shared, n_users=40, seed=0)
    torch.testing.assert_close(heads[30:], shared.expand(10, -1))


def test_too_few_users_to_learn_from_leave_the_shared_head_and_the_seed_decides():
    differences, rows, _ = two_kinds(n_users=6)
    everything = torch.ones(len(rows), dtype=torch.bool)
    options = {"train": everything, "fitted": everything, "shared": torch.ones(6), "n_users": 6}
    torch.testing.assert_close(encoded_heads(differences, rows, seed=0, **options), torch.ones(6, 6))
    differences, rows, _ = two_kinds(n_users=30)
    everything = torch.ones(len(rows), dtype=torch.bool)
    options = {"train": everything, "fitted": everything, "shared": torch.ones(6), "n_users": 30}
    first, second = (encoded_heads(differences, rows, seed=1, **options) for _ in range(2))
    assert torch.equal(first, second)
