"""What is held out: no prompt and no text on both sides, whatever is shared; nothing changes where nothing is."""

import pytest
import torch

from eigenpeft.reward import LoReFitter, evaluate_lore
from eigenpeft.reward.fitting.splitting import draw_sides, same_texts

N_FEATURES = 6


def drawn(texts, *, prompt_ids=None, share=0.3, seed=0):
    return draw_sides(texts, prompt_ids=prompt_ids, share=share, generator=torch.Generator().manual_seed(seed))


def on_both_sides(texts, sides):
    held, trained = (set(texts[mask & sides.used].flatten().tolist()) - {-1} for mask in (sides.held, ~sides.held))
    return held & trained


def test_equal_rows_are_one_text_and_rows_of_zeros_are_none():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, N_FEATURES, generator=generator)
    rejected = rows[torch.randperm(5000, generator=generator)]
    texts = same_texts(rows, rejected)
    assert (texts[:, 0][:, None] == texts[:, 0][None]).sum() == 5000  # none is taken for another
    for i in range(0, 5000, 501):
        assert torch.equal(rows[(texts[:, 0] == texts[i, 1]).nonzero().item()], rejected[i])
    assert (same_texts(rows, torch.zeros_like(rows))[:, 1] == -1).all()
    assert same_texts(rows.numpy(), rejected.numpy()).tolist() == texts.tolist()


def test_without_common_texts_each_comparison_is_drawn_alone():
    texts = torch.arange(2000).view(1000, 2)
    sides = drawn(texts)
    assert sides.by == "comparisons"
    assert sides.used.all()
    assert 0.25 < sides.held.double().mean() < 0.35
    same_draw = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sides.held, same_draw[0] < 0.3)


def test_comparisons_that_share_a_text_go_together():
    # A chain of three comparisons: the first and the last have no text in common.
    texts = torch.stack(
        [torch.tensor([[4 * i, 4 * i + 1], [4 * i + 1, 4 * i + 2], [4 * i + 2, 4 * i + 3]]) for i in range(200)]
    )
    texts = texts.view(600, 2)[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    sides = drawn(texts)
    assert sides.by == "groups that share texts"
    assert sides.used.all()
    assert not on_both_sides(texts, sides)
    assert 0.2 < sides.held.double().mean() < 0.4


def test_where_all_is_connected_texts_are_drawn_and_mixed_comparisons_left_out():
    generator = torch.Generator().manual_seed(2)
    texts = torch.stack([torch.randperm(40, generator=generator)[:2] for _ in range(3000)])
    sides = drawn(texts)
    assert sides.by == "texts"
    assert not on_both_sides(texts, sides)
    held, trained = (mask & sides.used for mask in (sides.held, ~sides.held))
    assert held.sum() > 200
    assert trained.sum() > 600
    assert not sides.used.all()


def test_prompts_that_share_an_answer_do_not_leak():
    prompts = [i // 3 for i in range(900)]
    texts = torch.arange(1800).view(900, 2)
    texts[::10, 1] = 0  # one answer to many prompts
    sides = drawn(texts, prompt_ids=prompts)
    assert sides.by == "prompts"
    assert not on_both_sides(texts, sides)
    assert all(len(set(sides.held[3 * i : 3 * i + 3].tolist())) == 1 for i in range(300))
    assert (sides.held & sides.used).sum() > 100


@pytest.fixture(scope="module")
def remembered():
    """Users who each like 30 texts at random: knowing the text tells all, its features nothing."""
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(60, 64, generator=generator), dim=1)
    likes = torch.randn(60, 1, generator=generator) + 0.3 * torch.randn(60, 40, generator=generator)
    chosen, rejected, users = [], [], []
    for user in range(40):
        for _ in range(40):
            first, second = torch.randperm(60, generator=generator)[:2].tolist()
            if likes[first, user] < likes[second, user]:
                first, second = second, first
            chosen.append(first)
            rejected.append(second)
            users.append(f"user {user}")
    return features, torch.tensor(chosen), torch.tensor(rejected), users


def test_what_was_only_remembered_is_no_gain(remembered):
    features, chosen, rejected, users = remembered
    options = {"user_ids": users, "fitter": LoReFitter(n_basis=(1, 2)), "n_bootstrap": 50, "shots": (0, 5)}
    found = evaluate_lore(features[chosen], features[rejected], **options)
    assert found.split == "texts"
    assert found.n_unused > 0
    assert "held out (by texts" in found.verdict
    assert "comparisons left out, whose texts stand on both sides" in found.verdict
    new = "new users, new prompts"
    assert abs(found.accuracy["shared head"][new].mean - 0.5) < 0.12
    # The control: noise of its own on every row hides that the texts are the same, and the split leaks.
    noise = 1e-6 * torch.randn(2, len(chosen), 64, generator=torch.Generator().manual_seed(4))
    leaking = evaluate_lore(features[chosen] + noise[0], features[rejected] + noise[1], **options)
    assert leaking.split == "comparisons"
    assert leaking.accuracy["shared head"][new].mean > 0.8
