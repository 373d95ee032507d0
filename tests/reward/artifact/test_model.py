"""The reward model: rewards by user, histories of every kind, saving, exporting, TRL's reward function."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from eigenpeft import LowRankRewardModel
from eigenpeft.artifacts.manifest import files_of
from eigenpeft.errors import ArtifactError, RewardModelError, UnknownUserError
from eigenpeft.reward.text.backbone import reference_head, with_head
from eigenpeft.reward.text.rewards import classify


def test_rewards_are_mixtures_of_the_basis(model, normal):
    features = normal(5, 4, seed=1)
    expected = features.double() @ model.reward_basis.double().mT @ torch.tensor([0.7, 0.2, 0.1]).double()
    torch.testing.assert_close(model.rewards(features, "ada").double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features @ model.reward_head("ada"), model.rewards(features, "ada"))
    both = model.rewards(features, ["ada", "bob", "ada", "bob", "bob"])
    assert torch.equal(both[[0, 2]], model.rewards(features, ["ada"] * 5)[[0, 2]])
    torch.testing.assert_close(model.rewards(features), features @ model.reward_head())
    probability = model.preference_probability(features[:2], features[2:4], user_ids="ada")
    margin = model.rewards(features[:2], "ada") - model.rewards(features[2:4], "ada")
    torch.testing.assert_close(probability, torch.sigmoid(margin))


def test_unknown_users(model, normal):
    features = normal(2, 4)
    with pytest.raises(UnknownUserError, match=r"^'eve' is not among the 2 users"):
        model.rewards(features, ["ada", "eve"])
    assert torch.allclose(model.rewards(features, "eve", unknown="population"), model.rewards(features))
    with pytest.raises(RewardModelError, match="unknown='guess' must be"):
        model.rewards(features, "ada", unknown="guess")
    for call in (model.reward_head, model.remove_user):
        with pytest.raises(UnknownUserError, match="'eve' is not among"):
            call("eve")
    with pytest.raises(UnknownUserError, match="'eve' is not among"):
        model.update_user("eve", chosen=features, rejected=features)


def test_the_card_is_readable_and_counts_nobody(model):
    model.info = {"base_model": "me/base", "n_basis": 3, "deviation_scale": 1.0}
    card = model.card()
    assert "run `eigenpeft lore evaluate` before relying on it" in card
    assert card.count("| n basis |") == 1
    assert "&#96;" not in card
    assert "2 users" not in card  # the table of users changes without the card
    model.info["verdict"] = "Pays `x` | <b>"
    assert "Pays &#96;x&#96; &#124; &lt;b&gt;" in model.card()  # text of a file stays harmless


def test_empty_history_is_the_population_and_history_moves_away(model, normal):
    empty = model.add_user("new", chosen=torch.zeros(0, 4), rejected=torch.zeros(0, 4))
    torch.testing.assert_close(empty.user_weights, model.population_weights)
    assert empty.n_pairs == model.users.n_pairs("new") == 0
    direction = normal(40, 4, seed=3)
    wanted = model.reward_basis[0]
    chosen = direction * torch.sign(direction @ wanted)[:, None]
    learnt = model.update_user("new", chosen=4 * chosen, rejected=torch.zeros(40, 4))
    assert learnt.user_weights[0] > 0.7
    assert learnt.covariance.diagonal().sum() < empty.covariance.diagonal().sum()
    assert model.users.n_pairs("new") == 40
    with pytest.raises(RewardModelError, match="'new' is known already; call update_user"):
        model.add_user("new", chosen=chosen, rejected=chosen)
    model.remove_user("new")
    assert "new" not in model.users


def test_contradictory_pairs_cancel(model, normal):
    chosen, rejected = normal(6, 4, seed=1), normal(6, 4, seed=2)
    both_ways = model.posterior(torch.cat([chosen, rejected]), torch.cat([rejected, chosen]))
    assert torch.isfinite(both_ways.user_weights).all()
    head = both_ways.user_weights @ model.reward_basis
    margins = (chosen - rejected) @ head
    assert margins.abs().mean() < ((chosen - rejected) @ model.reward_head()).abs().mean()


def test_many_users_at_once_are_each_as_alone(model, normal):
    chosen, rejected = normal(60, 4, seed=1), normal(60, 4, seed=2)
    user_ids = [f"u{i % 7}" for i in range(60)]
    assert model.fit_users(chosen, rejected, user_ids=user_ids) is model
    for user in ("u0", "u6"):
        mine = torch.tensor([name == user for name in user_ids])
        alone = model.posterior(chosen[mine], rejected[mine])
        torch.testing.assert_close(model.user_weights([user])[0], alone.user_weights, atol=1e-5, rtol=1e-5)
        assert model.users.n_pairs(user) == int(mine.sum())
    assert len(model.users) == 9


def test_next_pair_orders_candidates(model, normal):
    posterior = model.posterior(torch.zeros(0, 4), torch.zeros(0, 4))
    chosen, rejected = normal(10, 4, seed=1), normal(10, 4, seed=2)
    rejected[4] = chosen[4]  # no difference, nothing to learn
    order = model.next_pair(posterior, chosen=chosen, rejected=rejected)
    assert sorted(order) == list(range(10))
    assert order[-1] == 4


def test_bad_features(model):
    bad = torch.ones(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(RewardModelError, match="NaN or infinite, the first in row 1"):
        model.rewards(bad)
    with pytest.raises(RewardModelError, match="pair 1 are NaN or infinite"):
        model.posterior(bad, torch.zeros(3, 4))
    with pytest.raises(RewardModelError, match=r"features of shape \(3, 5\) must be \(n, 4\)"):
        model.rewards(torch.ones(3, 5))
    with pytest.raises(RewardModelError, match="width 5 do not fit a basis of width 4"):
        model.posterior(torch.ones(3, 5), torch.ones(3, 5))
    with pytest.raises(RewardModelError, match="3 chosen but 2 rejected"):
        model.posterior(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(RewardModelError, match="2 user_ids for 3 texts"):
        model.rewards(torch.ones(3, 4), ["ada", "bob"])
    with pytest.raises(RewardModelError, match="2 user_ids for 3 pairs"):
        model.fit_users(torch.ones(3, 4), torch.ones(3, 4), user_ids=["ada", "bob"])


def test_bad_construction():
    with pytest.raises(RewardModelError, match="must be a finite matrix"):
        LowRankRewardModel(torch.ones(3))
    with pytest.raises(RewardModelError, match="must be 2 positive numbers"):
        LowRankRewardModel(torch.eye(2), concentration=torch.tensor([1.0, 0.0]))


def test_saved_and_loaded_is_the_same(model, normal, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = LowRankRewardModel.from_pretrained(tmp_path / "m")
    features = normal(4, 4, seed=1)
    for user in (None, "ada", "bob"):
        assert torch.equal(again.rewards(features, user), model.rewards(features, user))
    assert torch.equal(again.concentration, model.concentration)
    assert "user u is" in (tmp_path / "m" / "README.md").read_text()

    again.add_user("eve", chosen=features, rejected=-features)
    before = (tmp_path / "m" / "lore.safetensors").stat().st_mtime_ns
    again.save_users(tmp_path / "m")
    assert (tmp_path / "m" / "lore.safetensors").stat().st_mtime_ns == before
    assert "eve" in LowRankRewardModel.from_pretrained(tmp_path / "m").users


def test_damaged_folders(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match="another reward basis"):
        LowRankRewardModel(model.reward_basis + 1).save_users(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "lore_config.json").read_text())
    (tmp_path / "m" / "lore_config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ArtifactError, match="format_version 99"):
        LowRankRewardModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "lore_config.json").write_text(json.dumps({**config, "sha256": "0"}))
    with pytest.raises(ArtifactError, match="a file was altered"):
        LowRankRewardModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "lore_users.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no lore_users\.safetensors"):
        LowRankRewardModel.from_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match="No reward model at 'nobody/nothing'"):
        LowRankRewardModel.from_pretrained("nobody/nothing")


TEXTS = ["a joke about cats", "the joke is not funny", "please help", "no"]


def test_with_a_backbone_it_is_a_stock_classifier(backbone, tokenizer, normal, tmp_path):
    model = LowRankRewardModel(normal(3, 16), backbone=backbone, processing_class=tokenizer)
    model.users.put(["ada"], user_weights=torch.tensor([[0.6, 0.3, 0.1]]), n_pairs=[5])
    assert backbone.config.num_labels == 1, "the caller's model was changed"
    model.save_pretrained(tmp_path / "m")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    by_basis = classify(stock, tokenizer, TEXTS, batch_size=3)
    assert by_basis.shape == (4, 3)
    again = LowRankRewardModel.from_pretrained(tmp_path / "m")
    again.save_pretrained(tmp_path / "again")
    head_stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(classify(head_stock, tokenizer, TEXTS, batch_size=2), by_basis, atol=1e-6, rtol=1e-5)

    # One user's export: a scalar model that agrees with the mixture, to rounding.
    again.to_sequence_classification("ada").save_pretrained(tmp_path / "ada")
    scalar = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ada").eval()
    assert scalar.config.num_labels == 1
    rewards = by_basis @ model.user_weights(["ada"])[0]
    torch.testing.assert_close(classify(scalar, tokenizer, TEXTS, batch_size=4)[:, 0], rewards, atol=1e-5, rtol=1e-5)


def test_a_folder_whose_head_is_not_its_basis_is_refused(backbone, tokenizer, normal, tmp_path):
    LowRankRewardModel(normal(3, 16), backbone=backbone).save_pretrained(tmp_path / "m")
    with_head(backbone, normal(3, 16, seed=9)).save_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match="another head than the reward basis"):
        LowRankRewardModel.from_pretrained(tmp_path / "m")
    assert LowRankRewardModel.from_pretrained(tmp_path / "m", load_backbone=False).backbone is None


def test_reference_head(backbone, normal):
    assert reference_head(backbone).shape == (16,)
    with pytest.raises(RewardModelError, match="3 labels; a reference reward has 1"):
        reference_head(with_head(backbone, normal(3, 16)))
    with pytest.raises(RewardModelError, match="fitted on features of another model"):
        with_head(backbone, normal(3, 8))
    with pytest.raises(RewardModelError, match="has no linear head"):
        reference_head(torch.nn.Sequential())


def test_reward_function_rewards_each_prompt_as_its_user_would(backbone, tokenizer, normal):
    model = LowRankRewardModel(normal(3, 16), backbone=backbone, processing_class=tokenizer)
    model.users.put(["ada", "bob"], user_weights=torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), n_pairs=[5, 5])
    func = model.reward_func(user_column="who", batch_size=2)
    prompts, completions = ["a joke ", "a joke ", "help "], ["about cats", "about cats", "me please"]
    rewards = func(prompts=prompts, completions=completions, who=["ada", "bob", "ada"], trainer_state=None)
    texts = [a + b for a, b in zip(prompts, completions, strict=True)]
    by_basis = classify(model.backbone, tokenizer, texts, batch_size=8)
    assert rewards == pytest.approx([by_basis[0, 0].item(), by_basis[1, 2].item(), by_basis[2, 0].item()], abs=1e-5)
    ended = model.reward_func(user_column="who", end_token=True)
    rewards = ended(prompts=["a joke ", "help "], completions=["about cats", "me</s>"], who=["ada", "bob"])
    by_basis = classify(model.backbone, tokenizer, ["a joke about cats</s>", "help me</s>"], batch_size=8)
    assert rewards == pytest.approx([by_basis[0, 0].item(), by_basis[1, 2].item()], abs=1e-5)
    alone = func(completions=["help me"], who=["ada"])
    assert alone == pytest.approx(
        [classify(model.backbone, tokenizer, ["help me"], batch_size=1)[0, 0].item()], abs=1e-5
    )
    chat = func(
        prompts=[[{"role": "user", "content": "help"}]],
        completions=[[{"role": "assistant", "content": "no"}]],
        who=["ada"],
    )
    rendered = classify(model.backbone, tokenizer, ["user help assistant no "], batch_size=1)
    assert chat == pytest.approx([rendered[0, 0].item()], abs=1e-5)
    assert func.__name__
    with pytest.raises(RewardModelError, match="got no column 'who'"):
        func(prompts=prompts, completions=completions)
    with pytest.raises(RewardModelError, match="must both be text"):
        func(prompts=["a"], completions=[[{"role": "assistant", "content": "no"}]], who=["ada"])
    with pytest.raises(UnknownUserError, match="'eve'"):
        func(prompts=["a"], completions=["b"], who=["eve"])


def test_best_of_n_picks_what_each_user_likes_best(backbone, tokenizer, normal):
    model = LowRankRewardModel(normal(3, 16), backbone=backbone, processing_class=tokenizer)
    model.users.put(["ada", "bob"], user_weights=torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), n_pairs=[5, 5])
    prompts, candidates = ["a joke ", "help ", "a joke "], [["about cats", "about you", "no"], ["me"], ["yes", "no"]]
    users = ["ada", "bob", "bob"]
    expected = []
    for prompt, options, basis in zip(prompts, candidates, (0, 2, 2), strict=True):
        rewards = classify(model.backbone, tokenizer, [prompt + option for option in options], batch_size=8)[:, basis]
        expected.append(int(rewards.argmax()))
    assert model.best_of_n(prompts, candidates, user_ids=users, batch_size=2) == expected
    with pytest.raises(RewardModelError, match=r"Prompts \[1\] have no candidate"):
        model.best_of_n(prompts, [["a"], [], ["b"]], user_ids=users)
    with pytest.raises(RewardModelError, match="3 prompts, 2 lists"):
        model.best_of_n(prompts, candidates[:2], user_ids=users)


def test_without_backbone_or_tokenizer(model, backbone, normal):
    for call in (model.reward_func, lambda: model.to_sequence_classification("ada")):
        with pytest.raises(RewardModelError, match="has no backbone"):
            call()
    with pytest.raises(RewardModelError, match="need the backbone's tokenizer"):
        LowRankRewardModel(normal(3, 16), backbone=backbone).reward_func()


def test_push_to_hub_uploads_what_save_writes(model, monkeypatch):
    seen = {}

    def upload(folder, repo_id, **options):
        seen.update(options, files=sorted(files_of(folder)), repo_id=repo_id)
        return "address"

    monkeypatch.setattr("eigenpeft.artifacts.pushing.push_folder", upload)
    assert model.push_to_hub("me/rewards", private=True) == "address"
    assert seen["files"] == ["README.md", "lore.safetensors", "lore_config.json", "lore_users.safetensors"]
    assert seen["private"] is True
    with pytest.raises(ArtifactError, match="repo_id='a/b/c' is not OWNER/NAME on the Hub"):
        model.push_to_hub("a/b/c")


def test_push_to_hub_leaves_the_place_of_the_users_alone(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "rewards")
    monkeypatch.setattr("eigenpeft.artifacts.pushing.push_folder", lambda *_, **__: "address")
    model.push_to_hub("me/rewards")
    other = type(model).from_pretrained(tmp_path / "rewards")
    other.users.remove("bob")
    other.save_users(tmp_path / "rewards")
    model.users.put(["eve"], user_weights=torch.tensor([[1.0, 0.0, 0.0]]), n_pairs=[1])
    model.save_users(tmp_path / "rewards")
    assert sorted(type(model).from_pretrained(tmp_path / "rewards").users) == ["ada", "eve"]
