"""The lore commands, from files to files."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from eigenpeft import LowRankRewardModel
from eigenpeft.cli import load
from eigenpeft.errors import RewardModelError, UnknownUserError
from eigenpeft.reward.evaluation.simulation import SimulatedUsers


def run(*arguments):
    result = CliRunner().invoke(load(), ["lore", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def features(tmp_path):
    pairs = SimulatedUsers(30, n_features=8, n_basis=2, shared=0.1, seed=0).pairs(30, seed=1)
    Dataset.from_dict(
        {"chosen": pairs.chosen.tolist(), "rejected": pairs.rejected.tolist(), "user_id": pairs.user_ids}
    ).to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


@pytest.fixture
def text(tmp_path, backbone, tokenizer):
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    words = ["cats", "dogs", "no", "yes", "help", "please"]
    rows = [
        {
            "prompt": f"a joke {words[i % 6]} ",
            "chosen": words[i % 5],
            "rejected": words[5 - i % 4 % 5],
            "user_id": i % 3,
        }
        for i in range(24)
        if i % 5 != 5 - i % 4  # a tie is refused
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "ada.jsonl").write_text("\n".join(json.dumps({**row, "user_id": "ada"}) for row in rows[:4]))
    return tmp_path


def test_fit_features_then_add_a_user(features, tmp_path):
    out = tmp_path / "rewards"
    fitted = run("fit", features, "--out", out, "--n-basis", 2)
    assert "2 basis rewards, 30 users" in " ".join(fitted.stdout.split())
    added = json.loads(run("add-user", out, "user-3", features, "--json").stdout)
    assert added["n_pairs"] == 30
    assert added["users"] == 30
    assert sum(added["weights"]) == pytest.approx(1)
    assert len(LowRankRewardModel.from_pretrained(out).users) == 30


def test_evaluate_says_whether_it_pays(features, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    plot = tmp_path / "evaluation.png"
    found = json.loads(run("evaluate", features, "--n-basis", 2, "--plot", plot, "--json").stdout)
    assert plot.stat().st_size > 10_000
    assert set(found["calibration"]["LoRe"]) == {"confidence", "accuracy", "counts", "error"}
    assert "ersonalisation" in found["verdict"]
    shown = " ".join(run("evaluate", features, "--n-basis", 2).stdout.split())
    assert "95 % by bootstrap of users" in shown
    assert found["verdict"][:30] in shown
    # 30 users, 9 of them new: too few for a verdict, which says so.
    assert found["verdict"].startswith("Unknown whether personalisation pays on this data: 21 known and 9 new users")
    assert "users asked" in shown


def test_from_text_to_a_users_own_classifier(text):
    fitted = json.loads(
        run(
            "fit", text / "text.jsonl", "--model", text / "backbone", "--n-basis", 2, "--out", text / "m", "--json"
        ).stdout
    )
    assert fitted["n_users"] == 3
    assert json.loads(run("add-user", text / "m", "ada", text / "ada.jsonl", "--json").stdout)["n_pairs"] == 4
    run("export", text / "m", "--user", "ada", "--out", text / "ada")
    stock = AutoModelForSequenceClassification.from_pretrained(text / "ada")
    model = LowRankRewardModel.from_pretrained(text / "m")
    head = next(m for m in reversed(list(stock.modules())) if isinstance(m, torch.nn.Linear) and m.out_features == 1)
    torch.testing.assert_close(head.weight[0], model.reward_head("ada"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["fit", "missing.jsonl", "--out", "x"], "There is no file or folder"),
        (["fit", "{text}/text.jsonl", "--out", "x"], "are text: name a reward model"),
        (
            ["fit", "{text}/text.jsonl", "--out", "x", "--user-column", "who"],
            "There is no column 'who': name the users' column with --user-column",
        ),
        (
            ["fit", "{text}/text.jsonl", "--out", "x", "--n-basis", "many", "--model", "{text}/backbone"],
            "must be a whole",
        ),
        (["fit", "{text}/notes.txt", "--out", "x"], "must end in"),
    ],
)
def test_errors(text, arguments, match):
    (text / "notes.txt").write_text("no comparisons")
    with pytest.raises(Exception, match=match):
        run(*(str(argument).format(text=text) for argument in arguments))


def test_a_user_without_comparisons(features, tmp_path):
    run("fit", features, "--out", tmp_path / "rewards", "--n-basis", 1)
    with pytest.raises(Exception, match="has no comparisons of 'eve'"):
        run("add-user", tmp_path / "rewards", "eve", features)


def test_texts_are_scored_for_one_user_or_each_by_its_own(text):
    run("fit", text / "text.jsonl", "--model", text / "backbone", "--n-basis", 2, "--out", text / "m")
    model = LowRankRewardModel.from_pretrained(text / "m")
    # So few comparisons fit users nearly alike on some machines; these two differ.
    model.users.put(["ada", "1"], user_weights=torch.tensor([[0.9, 0.1], [0.2, 0.8]]), n_pairs=[4, 7])
    model.save_users(text / "m")
    rows = [
        {"prompt": "a joke cats ", "completion": word, "user_id": user, "asked": {"at": 7}}
        for word, user in (("dogs", "ada"), ("yes", "ada"), ("yes", "1"))
    ]
    (text / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = json.loads(
        run("score", text / "m", text / "answers.jsonl", "--out", text / "scores.jsonl", "--json").stdout
    )
    reward = LowRankRewardModel.from_pretrained(text / "m").reward_func()
    asked = {key: [row[key] for row in rows] for key in ("completion", "prompt", "user_id")}
    expected = reward(completions=asked["completion"], prompts=asked["prompt"], user_id=asked["user_id"])
    assert [row["reward"] for row in found["rows"]] == pytest.approx(expected, rel=1e-5)
    assert [json.loads(line) for line in (text / "scores.jsonl").read_text().splitlines()] == found["rows"]
    assert len({row["reward"] for row in found["rows"]}) == 3
    # A result is joined to its row by number, and has its columns.
    for i, (row, own) in enumerate(zip(found["rows"], rows, strict=True)):
        assert row == {"row": i, **own, "user": own["user_id"], "reward": row["reward"]}
    same = json.loads(run("score", text / "m", text / "answers.jsonl", "--user", "ada", "--json").stdout)["rows"]
    assert [row["user"] for row in same] == ["ada"] * 3
    assert same[1]["reward"] == same[2]["reward"] != expected[2]
    assert "3 rows, 2 users" in run("score", text / "m", text / "answers.jsonl").stdout


def test_features_are_scored_without_a_backbone(features, tmp_path):
    run("fit", features, "--out", tmp_path / "rewards", "--n-basis", 2)
    model = LowRankRewardModel.from_pretrained(tmp_path / "rewards")
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"features": row.tolist()}) for row in rows))
    found = json.loads(run("score", tmp_path / "rewards", path, "--user", "user-3", "--json").stdout)["rows"]
    assert [row["reward"] for row in found] == pytest.approx(model.rewards(rows, "user-3").tolist(), rel=1e-5)
    for column, message in (
        ("completion", "was fitted on features and has no backbone"),
        ("text", "texts to score are in one called completion"),
    ):
        texts = tmp_path / f"{column}.jsonl"
        texts.write_text(json.dumps({column: "a text"}))
        with pytest.raises(RewardModelError, match=message):
            run("score", tmp_path / "rewards", texts, "--user", "user-3")


def test_whose_rewards_must_be_said_and_known(features, tmp_path):
    run("fit", features, "--out", tmp_path / "rewards", "--n-basis", 2)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"features": [0.0] * 8}))
    with pytest.raises(RewardModelError, match="name one user for all rows with --user"):
        run("score", tmp_path / "rewards", path)
    missing = tmp_path / "missing.jsonl"
    missing.write_text("\n".join(json.dumps({"features": [0.0] * 8, "user_id": user}) for user in ("user-3", None)))
    with pytest.raises(RewardModelError, match="Row 1 of .* has no user in its column 'user_id'"):
        run("score", tmp_path / "rewards", missing)
    with pytest.raises(UnknownUserError, match="nobody"):
        run("score", tmp_path / "rewards", path, "--user", "nobody")
    with pytest.raises(RewardModelError, match="must be one of error, population"):
        run("score", tmp_path / "rewards", path, "--user", "nobody", "--unknown", "guess")
    everybody = run("score", tmp_path / "rewards", path, "--user", "nobody", "--unknown", "population", "--json")
    assert json.loads(everybody.stdout)["rows"] == [{"row": 0, "user": "nobody", "reward": 0.0}]
    assert json.loads(everybody.stdout)["unknown"] == ["nobody"]
    told = run("score", tmp_path / "rewards", path, "--user", "nobody", "--unknown", "population").stdout
    assert "1 user is unknown and scored as everybody: nobody" in " ".join(told.split())


def test_the_best_rows_of_each_user_and_columns_that_results_replace(features, tmp_path):
    run("fit", features, "--out", tmp_path / "rewards", "--n-basis", 2)
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"features": vector, "user": user, "reward": "old", "missing": missing, "item": i}
        for i, (vector, missing) in enumerate(zip(vectors, (1.5, None, 2.0, 0.0), strict=True))
        for user in ("user-3", "user-5")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    asked = ("score", tmp_path / "rewards", path, "--user-column", "user")
    every = json.loads(run(*asked, "--json").stdout)
    best = json.loads(run(*asked, "--top-k", 2, "--json").stdout)["rows"]
    assert every["replaced_columns"] == ["reward"]
    assert every["rows"][2]["missing"] is None
    for user in ("user-3", "user-5"):
        own = sorted((row for row in every["rows"] if row["user"] == user), key=lambda row: -row["reward"])
        assert [row for row in best if row["user"] == user] == own[:2]
    assert [rows[row["row"]]["item"] for row in best] == [row["item"] for row in best]
    told = " ".join(run(*asked, "--top-k", 1).stdout.split())
    assert "2 rows, 2 users" in told
    assert "The data's own columns reward are left out" in told
    assert "one shared head" not in told


def test_one_shared_head_is_said_to_score_all_users_alike(features, tmp_path):
    fitted = run("fit", features, "--out", tmp_path / "rewards", "--n-basis", 1).stdout
    assert "1 basis reward, 30 users" in " ".join(fitted.split())
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"features": [1.0] * 8}))
    for arguments in (("add-user", "rewards", "user-3", features), ("score", "rewards", path, "--user", "user-3")):
        command, folder, *others = arguments
        told = " ".join(run(command, tmp_path / folder, *others).stdout.split())
        assert told.count("This model has one shared head: all users' rewards are the same.") == 1
    assert "a head that all users share" in (tmp_path / "rewards" / "README.md").read_text()
    run("fit", features, "--out", tmp_path / "two", "--n-basis", 2)
    told = " ".join(run("add-user", tmp_path / "two", "user-3", features).stdout.split())
    assert "shared head" not in told
    assert "user-3, which was known and is fitted anew: weights" in told
