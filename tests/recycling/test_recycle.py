"""recycle on a small classifier: the result is a plain LoRA with the winner's logits, trials are remembered, and refusals."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from eigenpeft import AdapterCollection
from eigenpeft.errors import ArtifactError, EigenPeftError
from eigenpeft.recycling import CANDIDATES, RecycleReport, Trial, recycle, run
from eigenpeft.recycling.report import FinalScore, _beside_fresh
from eigenpeft.recycling.result import write_result
from eigenpeft.recycling.search import Search
from eigenpeft.recycling.training import judge
from tests.factories import random_factors, tiny_bert, tiny_llama, write_adapter

NAMES = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]


def task_rows(count=32):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (count, 7), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0]) % 2} for row in ids]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    width = tiny_bert().config.hidden_size
    for i in range(4):
        factors = random_factors(modules=dict.fromkeys(NAMES, (width, width)), rank=2, seed=i)
        write_adapter(
            folder / f"a{i}", {name: (0.1 * b, 0.1 * a) for name, (b, a) in factors.items()}, task_type="SEQ_CLS"
        )
    return AdapterCollection.from_pretrained(folder)


def arguments(folder, **changes):
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "seed": 3, "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder / "unused"), **{**settings, **changes})


def make_model():
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def recycled(adapters, folder, *, rows=None, args=None, **changes):
    return recycle(
        adapters,
        make_model=changes.pop("make_model", make_model),
        rows=task_rows() if rows is None else rows,
        args=args or arguments(folder),
        out_dir=folder / "out",
        n_components=changes.pop("n_components", 2),
        progress=False,
        **changes,
    )


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_every_candidate_ends_as_a_plain_lora_with_the_logits_of_the_trained_model(
    adapters, tmp_path, name, monkeypatch
):
    seen, ids = {}, torch.tensor([row["input_ids"] for row in task_rows()])

    def remember(model, folder, *, base_model, card):
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=ids).logits
        write_result(model, folder, base_model=base_model, card=card)

    monkeypatch.setattr(run, "write_result", remember)
    report = recycled(adapters, tmp_path, candidates=[name])
    assert report.winner == name
    assert not report.refused
    torch.manual_seed(3)
    untrained = make_model().eval()
    model = PeftModel.from_pretrained(make_model(), tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        assert (found - untrained(input_ids=ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, seen["logits"], atol=1e-5, rtol=1e-4)


def test_the_better_half_gets_twice_the_steps(adapters, tmp_path):
    names = ["eigenlora", "random_subspace", "lora_r8", "same_parameters"]
    report = recycled(adapters, tmp_path, candidates=names, args=arguments(tmp_path, max_steps=32), budget=6.0)
    rounds = sorted({trial.steps for trial in report.trials})
    assert [b // a for a, b in zip(rounds, rounds[1:], strict=False)] == [2, 2]
    by_round = [[trial for trial in report.trials if trial.steps == steps] for steps in rounds]
    assert [len(trials) for trials in by_round] == [8, 4, 2]
    for trials, kept in zip(by_round, by_round[1:], strict=False):
        assert (trials[0].candidate, trials[0].learning_rate) == ("lora_r8", 3e-3)  # the control, in every round
        best = sorted(trials[1:], key=lambda trial: trial.loss)[: len(trials[1:]) // 2]
        assert {(trial.candidate, trial.learning_rate) for trial in best} == {
            (trial.candidate, trial.learning_rate) for trial in kept[1:]
        }
    assert all(len(trial.losses) == report.n_held_out for trial in report.trials)
    assert report.control is not None
    assert report.control[1] == rounds[-1]
    assert report.winner in report.text
    again = RecycleReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report


@pytest.mark.parametrize(("rate", "winner"), [(1e-9, "lora_r8"), (0.3, "eigenlora")])
def test_a_rival_wins_only_if_it_is_ahead_of_the_control_by_more_than_chance(adapters, tmp_path, rate, winner):
    rows = [{"input_ids": [3 + i % 2] * 7, "labels": i % 2} for i in range(32)]  # what can be learnt
    chosen = {"lora_r8": (1e-9,), "eigenlora": (rate,)}
    options = {
        "rows": rows,
        "candidates": list(chosen),
        "learning_rates": chosen,
        "args": arguments(tmp_path, max_steps=24),
        "head_learning_rate": 1e-9,
    }
    report = recycled(adapters, tmp_path, **options)
    control, rival = report.trials
    assert (report.winner, report.rival) == (winner, "eigenlora")
    gaps = torch.tensor(control.losses) - torch.tensor(rival.losses)
    mean, error = float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)
    assert report.lead == (pytest.approx(mean, abs=1e-6), pytest.approx(error, abs=1e-6))
    assert (mean > error) == (winner == "eigenlora")
    assert ("ahead of that by" in report.text) == (winner == "eigenlora")
    best = rival if winner == "eigenlora" else control
    assert report.decisive == best
    if winner == "eigenlora":
        assert f"after {best.steps} steps: {best.loss:.3f} (score {best.score:.3f})" in report.text
        assert f"a fresh LoRA r 8 had {control.loss:.3f} (score {control.score:.3f}), and it was ahead" in report.text
    weights = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    assert (report.rank, report.n_bytes) == (8, weights.stat().st_size)


def test_test_rows_are_for_scores_alone(adapters, tmp_path):
    rows = [{"input_ids": [3 + i % 2] * 7, "labels": i % 2} for i in range(32)]
    others = [{"input_ids": [3 + i % 2] * 6 + [9], "labels": i % 2 if i else 1} for i in range(9)] + rows[:2]
    options = {"rows": rows, "candidates": ["lora_r8", "same_parameters"], "args": arguments(tmp_path, max_steps=16)}
    plain = recycled(adapters, tmp_path / "plain", **options)
    report = recycled(adapters, tmp_path / "tested", test_rows=others, **options)
    figures = [(each.candidate, each.steps, each.losses) for each in report.trials]
    assert figures == [(each.candidate, each.steps, each.losses) for each in plain.trials]
    weights = [tmp_path / name / "out" / "adapter" / "adapter_model.safetensors" for name in ("plain", "tested")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    model = PeftModel.from_pretrained(make_model(), weights[1].parent).eval()
    with torch.no_grad():
        right = torch.tensor(
            [
                float(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax() == row["labels"])
                for row in others
            ]
        )
    result = report.tested[0]
    assert result.name == report.winner
    assert result.score == pytest.approx(float(right.mean()))
    assert result.error == pytest.approx(float(right.std() / len(others) ** 0.5))
    assert {each.name for each in report.tested} == {report.winner, "lora_r8", "head alone"}
    for each in report.tested[1:]:
        assert each.lead is not None
        assert each.lead[0] == pytest.approx(result.score - each.score)
    assert (report.n_test, report.n_test_seen) == (11, 2)
    assert "On 11 test rows, used for nothing else, accuracy ± standard error over rows: the result" in report.text
    assert "2 of the test rows are among the training rows too" in report.text
    fresh = next((each for each in report.tested[1:] if each.name == "lora_r8"), result)  # or the result is one
    if fresh is not result:
        way = "ahead" if fresh.lead[0] >= 0 else "behind"
        assert f"(the result is {way} by {abs(fresh.lead[0]):.3f} ± " in report.text
    own = [each for each in report.trials if each.candidate == "lora_r8"]
    longest = max(each.steps for each in own)
    best = min((each for each in own if each.steps == longest), key=lambda each: each.loss)
    assert fresh.learning_rate == best.learning_rate  # chosen for the control as for the result
    saved = json.loads((tmp_path / "tested" / "out" / "report.json").read_text())
    assert RecycleReport.from_dict(saved) == report


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        ((0.05, 0.02), "recycling was ahead by more than two standard errors, with this one seed."),
        ((-0.05, 0.02), "a fresh LoRA was ahead by more than two standard errors, with this one seed."),
        ((-0.048, 0.05), "recycling did not surely beat a fresh LoRA, nor the other way round"),
        ((0.02, None), ""),
    ],
)
def test_the_test_rows_end_in_a_sentence_about_a_fresh_lora(lead, said):
    own = FinalScore("merged_head", 1e-2, -0.674, 0.17, 0.674)
    text = _beside_fresh((own, FinalScore("lora_r8", 1e-2, -0.626, 0.127, 0.626, lead)))
    assert text.removeprefix(" There ").startswith(said)
    assert bool(text) == bool(said)
    assert _beside_fresh((own,)) == ""


def test_candidates_that_the_budget_does_not_reach_are_named(adapters, tmp_path):
    small = recycled(adapters, tmp_path / "small", args=arguments(tmp_path, max_steps=40), budget=1.0)
    tried = {trial.candidate for trial in small.trials}
    assert "lora_r8" in tried
    # The head on the merged start is trained for λ, whether or not it is a candidate of the rounds.
    assert set(small.skipped) - {"merged_head"} == set(CANDIDATES) - tried
    assert "random_subspace" in small.skipped
    assert small.text.startswith(f"Best of {len(tried - set(small.skipped))} candidates") or small.is_at_chance
    assert sum(trial.steps for trial in small.trials) <= 40
    assert len({trial.learning_rate for trial in small.trials if trial.candidate == "lora_r8"}) == 1


def test_it_says_how_much_there_is_to_do_and_how_long_that_takes(adapters, tmp_path):
    lines, steps = [], []

    def counted(**settings):
        steps.append(settings["args"].max_steps)
        return Trainer(**settings)

    names = ["lora_r8", "eigenlora", "merged_head", "nearest_continued"]
    options = {"candidates": names, "args": arguments(tmp_path, max_steps=32), "budget": 6.0}
    options |= {"trainer": counted, "say": lines.append}
    report = recycled(adapters, tmp_path, **options)
    planned, estimate = lines
    first = steps[0]
    assert planned.startswith(
        f"4 candidates: 5 short trainings to prepare, 8 trials of {first} steps, 4 trials of {2 * first}"
    )
    assert planned.endswith("and one training of 32 steps on all rows.")
    assert f"The first trial took {report.trials[0].seconds:.1f} s for {first} steps" in estimate
    # What is announced is what is done; the merged head at the best multiplier was tried in the preparation already.
    announced = (
        5 * first + sum(int(n) * int(each) for n, each in re.findall(r"(\d+) trials of (\d+) steps", planned)) + 32
    )
    assert announced - first <= sum(steps) <= announced
    del lines[:]
    recycled(adapters, tmp_path, **options)
    assert lines == [planned]  # nothing is trained again, so that nothing is estimated


@torch.no_grad()
def test_a_language_model_is_judged_row_by_row():
    model = tiny_llama().eval()
    ids = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(1))
    rows = [
        {"input_ids": row[:length], "labels": row[:length]} for row, length in zip(ids, (9, 3, 5, 7, 4), strict=True)
    ]

    def collator(chosen):
        longest = max(len(row["labels"]) for row in chosen)
        labels = torch.full((len(chosen), longest), -100)
        for one, row in zip(labels, chosen, strict=True):
            one[: len(row["labels"])] = row["labels"]
        return {"input_ids": labels.clamp(min=0), "labels": labels}

    score, losses = judge(model, rows, data_collator=collator)
    expected = [float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss) for row in rows]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert score == pytest.approx(-sum(expected) / 5, rel=1e-5)


def report_of(*, lora_r8, init, winner, **changes):
    """A report of two trials with these scores."""
    scores = {"lora_r8": lora_r8, "init": init}
    trial = {"learning_rate": 1e-3, "steps": 8, "scale": None, "loss": 0.7, "n_parameters": 12, "seconds": 1.0}
    return RecycleReport(
        winner=winner,
        learning_rate=1e-3,
        steps=8,
        score=scores[winner],
        control=(lora_r8, 8),
        trials=tuple(Trial(candidate=name, score=score, **trial) for name, score in scores.items()),
        refused={},
        n_train=48,
        n_held_out=16,
        seconds=3.0,
        stopped=False,
        **changes,
    )


def test_trials_at_chance_are_not_ranked():
    report = report_of(lora_r8=0.5, init=0.62, winner="init", majority=0.5)
    trials = report.trials
    assert report.is_at_chance
    assert report.text.startswith(
        "None of the 2 trials learnt anything that 16 held-out rows show: they scored 0.500 to 0.620"
    )
    assert "the commonest label for every row scores 0.500 ± 0.250" in report.text
    better = replace(report, trials=(replace(trials[0], score=0.8), trials[1]))
    assert not better.is_at_chance
    assert better.text.startswith("Best of 2 candidates: init")
    assert not replace(report, majority=None).is_at_chance  # losses have no such bound


@pytest.mark.parametrize(("rival", "is_compared"), [(None, False), ("lora_r8", False), ("init", True)])
def test_no_comparison_is_claimed_that_was_not_made(rival, is_compared):
    report = report_of(lora_r8=0.8, init=0.7, winner="lora_r8", rival=rival, lead=(-0.1, 0.1))
    assert ("nothing that was recycled did better" in report.text) == is_compared
    assert ("nothing that was recycled was trained as long" in report.text) != is_compared


def test_a_second_call_repeats_no_trial(adapters, tmp_path):
    made = []

    def counted(**settings):
        made.append(settings["args"].max_steps)
        return Trainer(**settings)

    first = recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"], trainer=counted)
    before = len(made)
    second = recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"], trainer=counted)
    assert len(made) == before + 1  # the winner on all rows
    assert second.trials == first.trials
    with pytest.raises(EigenPeftError, match="holds trials with another rows, rows_sha256"):
        recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"], rows=task_rows(20))
    others = task_rows()
    others[3]["labels"] = 1 - others[3]["labels"]  # as many rows, one of them corrected
    with pytest.raises(EigenPeftError, match="holds trials with another rows_sha256;"):
        recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"], rows=others)
    log = tmp_path / "out" / "trials.jsonl"
    log.write_text(log.read_text() + '{"candidate": "lora_r8", "rate')  # of a run that was killed
    assert recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"]).trials == first.trials
    whole = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    older = [{key: value for key, value in trial.items() if key != "losses"} for trial in whole]
    log.write_text("".join(json.dumps(trial) + "\n" for trial in older))  # of a version that kept no losses
    again = recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"])
    assert [replace(trial, seconds=0.0) for trial in again.trials] == [
        replace(trial, seconds=0.0) for trial in first.trials
    ]
    log.write_text('{"candidate": 3}\n')
    with pytest.raises(EigenPeftError, match="cannot be read"):
        recycled(adapters, tmp_path, candidates=["lora_r8", "eigenlora"])


def test_a_finished_result_is_not_replaced_by_one_that_was_chosen_otherwise(adapters, tmp_path):
    some = ["lora_r8", "eigenlora"]
    first = recycled(adapters, tmp_path, candidates=some, budget=3.0)
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for changes in (
        {"budget": 0.5, "time_limit": 0.0},
        {"budget": 6.0},
        {"candidates": ["lora_r8"], "budget": 3.0},
        {"learning_rates": {"eigenlora": (0.5,)}, "budget": 3.0},
    ):
        with pytest.raises(
            ArtifactError, match=rf"holds a finished result, {first.winner}, which was chosen with"
        ) as refused:
            recycled(adapters, tmp_path, **{"candidates": some, **changes})
        assert "Choose another out_dir (--out); or pass overwrite=True" in str(refused.value)
        if "candidates" in changes:
            assert "the candidates lora_r8, eigenlora (now lora_r8)" in str(refused.value)
        elif "learning_rates" in changes:
            assert "lora_r8 0.003 0.001, eigenlora 0.01 0.03 (now lora_r8 0.003 0.001, eigenlora 0.5)" in str(
                refused.value
            )
        else:
            assert f"the budget 3 (now {changes['budget']:g})" in str(refused.value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == written
    again = recycled(adapters, tmp_path, candidates=some, budget=3.0, time_limit=0.0)  # all of the evidence is there
    assert (again.trials, again.winner, again.score) == (first.trials, first.winner, first.score)
    short = recycled(adapters, tmp_path, candidates=some, budget=0.5, overwrite=True)
    assert {trial.steps for trial in short.trials}.isdisjoint({trial.steps for trial in first.trials})
    back = recycled(adapters, tmp_path, candidates=some, budget=3.0, overwrite=True)
    assert back.trials == first.trials  # those of the other budget lie there too, and are no part of this choice
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match="nothing says how the result beside it was chosen"):
        recycled(adapters, tmp_path, candidates=some, budget=3.0)


def test_with_overwrite_other_rows_start_anew(adapters, tmp_path):
    recycled(adapters, tmp_path, candidates=["lora_r8"])
    report = recycled(adapters, tmp_path, candidates=["lora_r8"], rows=task_rows(20), overwrite=True)
    assert (report.n_train + report.n_held_out, len(report.trials)) == (20, 2)  # two rates
    log = tmp_path / "out" / "trials.jsonl"
    assert len(log.read_text().splitlines()) == 2
    (tmp_path / "out" / "settings.json").write_text('{"mine": 1}')  # of another program
    with pytest.raises(EigenPeftError, match="or remove it"):
        recycled(adapters, tmp_path, candidates=["lora_r8"], overwrite=True)


def test_trials_of_another_base_model_do_not_count(adapters, tmp_path, monkeypatch):
    def of(name):
        def make():
            model = make_model()
            model.config.name_or_path = name
            return model

        return make

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    recycled(adapters, tmp_path, candidates=["lora_r8"], make_model=of("base"))
    recycled(adapters, tmp_path, candidates=["lora_r8"], make_model=of(str(tmp_path / "base")))  # the same folder
    with pytest.raises(EigenPeftError, match="holds trials with another base_model"):
        recycled(adapters, tmp_path, candidates=["lora_r8"], make_model=of("other/base"))


def test_the_estimate_counts_the_trainings_for_test_rows(adapters, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(Search, "_estimate", lambda search, first: planned.append(search.work))
    recycled(adapters, tmp_path / "alone", candidates=["lora_r8"])
    recycled(adapters, tmp_path / "tested", candidates=["lora_r8"], test_rows=task_rows(8))
    alone, tested = planned[0], planned[-1]
    assert tested - alone == 2 * arguments(tmp_path).max_steps


def test_an_adapter_that_is_read_is_not_written_over(adapters, tmp_path):
    recycled(adapters, tmp_path, candidates=["lora_r8"])
    with AdapterCollection.from_pretrained(tmp_path / "out") as own:
        assert own.names == ("out",)
        with pytest.raises(EigenPeftError, match="which is read"):
            recycled(own, tmp_path, candidates=["lora_r8"], overwrite=True)
    trained = tmp_path / "other" / "out" / "adapter"
    trained.mkdir(parents=True)
    (trained / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds files that eigenpeft did not write"):
        recycled(adapters, tmp_path / "other", candidates=["lora_r8"], overwrite=True)
    assert not (tmp_path / "other" / "out" / "trials.jsonl").exists()  # refused before anything was trained


def test_a_trial_that_was_half_written_spoils_none_after_it(adapters, tmp_path):
    recycled(adapters, tmp_path, candidates=["lora_r8"])
    log = tmp_path / "out" / "trials.jsonl"
    log.write_text('{"candidate": "lora_r8", "rate')  # killed while it wrote
    first = recycled(adapters, tmp_path, candidates=["lora_r8"])
    assert recycled(adapters, tmp_path, candidates=["lora_r8"]).trials == first.trials


def test_a_time_limit_ends_the_rounds_and_the_best_so_far_is_trained(adapters, tmp_path):
    report = recycled(adapters, tmp_path, time_limit=0.0, candidates=["lora_r8", "eigenlora", "random_subspace"])
    assert report.stopped
    assert len(report.trials) == 1
    assert "time limit" in report.text


def test_trials_of_an_earlier_run_count_when_the_time_is_up(adapters, tmp_path):
    some = ["lora_r8", "eigenlora", "random_subspace"]
    first = recycled(adapters, tmp_path, candidates=some)
    again = recycled(adapters, tmp_path, candidates=some, time_limit=0.0)
    assert again.trials == first.trials
    assert (again.winner, again.learning_rate, again.score) == (first.winner, first.learning_rate, first.score)
    log = tmp_path / "out" / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    whole_rounds = [line for line in lines if json.loads(line)["steps"] < first.trials[-1].steps]
    log.write_text("".join(whole_rounds))  # interrupted before the last round
    stopped = recycled(adapters, tmp_path, candidates=some, time_limit=0.0)
    assert stopped.stopped
    assert len(stopped.trials) == len(whole_rounds)
    last = [trial for trial in stopped.trials if trial.steps == stopped.trials[-1].steps]
    assert stopped.winner in {trial.candidate for trial in last}


def test_what_cannot_be_tried_is_named(adapters, tmp_path):
    report = recycled(adapters, tmp_path, n_components=50, candidates=["lora_r8", "eigenlora"])
    assert report.winner == "lora_r8"
    assert "eigenlora" in report.refused
    assert "lora_r8" in report.text


def test_where_nothing_can_be_tried_each_reason_is_said(adapters, tmp_path):
    with pytest.raises(EigenPeftError, match=r"No candidate could be tried\. eigenlora: (?s:.*)n_components=50"):
        recycled(adapters, tmp_path, n_components=50, candidates=["eigenlora"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["best"]}, "must be of lora_r8"),
        ({"candidates": []}, "at least one"),
        ({"held_out": 1.0}, "held_out=1.0 between 0 and 1"),
        ({"budget": 0.0}, "budget=0.0 must be a positive number of trainings"),
        (
            {"learning_rates": {"best": (1e-3,)}},
            "learning_rates names best, which is not tried; the candidates here are lora_r8",
        ),
        (
            {"candidates": ["lora_r8"], "learning_rates": {"init": (1e-3,)}},
            "names init, which is not tried; the candidates here are lora_r8.",
        ),
        ({"learning_rates": {"eigenlora": 0.1}}, r"=0.1 must be positive numbers, at least one, in a list or tuple"),
        (
            {"learning_rates": {"eigenlora": ()}},
            r"learning_rates\['eigenlora'\]=\(\) must be positive numbers, at least one",
        ),
        ({"learning_rates": {"eigenlora": (0.1, -1.0)}}, r"=\(0.1, -1.0\) must be positive numbers"),
        ({"rows": task_rows(1)}, "1 rows cannot be split"),
    ],
)
def test_bad_arguments_are_refused(adapters, tmp_path, changes, message):
    with pytest.raises(EigenPeftError, match=message):
        recycled(adapters, tmp_path, **changes)
