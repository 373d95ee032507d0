"""The three answers: compressing against counted numbers, probabilities of a known calibration, and when nothing is known."""

import json
import math
import re

import pytest
import torch

from eigenpeft import AdapterCollection
from eigenpeft.audit import Calibration, audit_adapters, load_calibration
from eigenpeft.audit.task.calibration import Event
from eigenpeft.audit.task.training_answer import measures_of_adapters, train_answer
from eigenpeft.errors import ArtifactError
from tests.factories import make_collection, random_factors, write_adapter

MODULES = {"layer.0.query": (60, 80), "layer.1.query": (60, 80)}


def audited(folder, **options):
    return audit_adapters(AdapterCollection.from_pretrained(folder), progress=False, n_components=16, **options)


def event(*, gain=(0.05, 0.01, 0.09), weights=(2.0,), judged=(40, 25)):
    return Event(
        "EigenLoRA ahead", ("held_out",), (-1.0,), (0.5,), weights, 0.3, 0.6, (1.5, 0.5), 0.2, 0.25, gain, judged
    )


def calibration(**changes):
    settings = {
        "source": "a test",
        "base_models": ("tiny",),
        "n_adapters": (5, 20),
        "n_collections": 3,
        "n_tasks": 10,
        "seen": {"adapters": {"held_out": (-2.0, 0.0), "rows": (-2.0, 2.0)}, "task": {}},
        "events": {"adapters": (event(),), "task": ()},
    }
    return Calibration(**{**settings, **changes})


MEASURES = {"held_out": -0.5, "rows": 0.0}


def asked(found=None, *, measures=None, base_model="owner/Tiny"):
    return train_answer(found or calibration(), measures or MEASURES, base_model=base_model, n_rows=64, with_task=False)


def test_compressing_pays_where_many_adapters_share_few_directions(tmp_path):
    made = make_collection(tmp_path, n_adapters=20, modules=MODULES, rank=4, n_shared=6, noise=0.01, seed=0)
    found = audited(made.folder).compress
    assert found.answer == "yes"
    assert "no subspace is needed" not in found.text
    assert found.n_lora_parameters == 2 * 4 * (60 + 80)
    full, paired = ([row for row in found.rows if row.core == core] for core in ("full", "diagonal"))
    row = next(row for row in full if row.n_components == 8)
    assert row.n_parameters == 2 * 8 * 8
    assert row.kept_share > 0.99
    assert row.relative_error == pytest.approx(math.sqrt(1 - row.kept_share))
    assert row.ratio == pytest.approx((2 * 8 * (60 + 80) + 20 * row.n_parameters) / (20 * found.n_lora_parameters))
    assert [each.relative_error for each in full] == sorted((each.relative_error for each in full), reverse=True)
    pairs = next(row for row in paired if row.n_components == 16)
    assert pairs.n_parameters == 2 * 16
    assert 0.3 < pairs.kept_share < 1.0
    assert pairs.ratio == pytest.approx((2 * 16 * (60 + 80) + 20 * pairs.n_parameters) / (20 * found.n_lora_parameters))


def test_compressing_does_not_pay_for_a_few_strangers(tmp_path):
    for i in range(4):
        write_adapter(tmp_path / f"a{i}", random_factors(modules=MODULES, rank=4, seed=i))
    found = audited(tmp_path).compress
    assert found.answer == "no"
    assert found.text.startswith("No.")


def test_each_lora_cut_alone_is_the_control(tmp_path):
    # Updates of nearly rank one: a cut LoRA keeps them, and no subspace of unlike adapters is as small.
    kept = []
    for i in range(4):
        factors = {}
        for module, (lora_B, lora_A) in random_factors(modules=MODULES, rank=4, seed=i).items():
            left, values, right = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
            values = values[0] * torch.tensor([1.0, 0.1, 0.1, 0.1])
            factors[module] = (left[:, :4] * values, right[:4])
            kept.append(float(values[0] ** 2 / values.square().sum()))
        write_adapter(tmp_path / f"a{i}", factors)
    found = audited(tmp_path).compress
    cut = {row.n_components: row for row in found.rows if row.core == "truncated"}
    assert sorted(cut) == [1, 2, 3]  # of rank 4: all of it is no cut
    assert cut[1].kept_share == pytest.approx(sum(kept) / len(kept), rel=1e-4)
    assert cut[1].n_parameters == 2 * (60 + 80)
    assert cut[1].ratio == pytest.approx(1 / 4)
    assert (
        "no subspace is needed for that: each LoRA cut to rank 1 on its own keeps 97.1% in 25% of the numbers"
        in found.text
    )


def test_a_probability_is_that_of_the_logistic_model():
    found = asked()
    expected = 1 / (1 + math.exp(-(0.3 + 2.0 * (-0.5 + 1.0) / 0.5)))
    assert found.chances[0].probability == pytest.approx(expected)
    assert found.answer == "likely"
    assert "EigenLoRA ahead, 91% (on average +1.5 ± 0.5 points)" in found.text


@pytest.mark.parametrize(("weights", "answer"), [((-2.0,), "unlikely"), ((-0.3,), "open")])
def test_the_answer_follows_the_probability(weights, answer):
    assert asked(calibration(events={"adapters": (event(weights=weights),), "task": ()})).answer == answer


@pytest.mark.parametrize("changes", [{"gain": (0.01, -0.01, 0.03)}, {"judged": (6, 0)}, {"judged": (40, 38)}])
def test_a_model_that_was_not_shown_to_beat_the_base_rate_gives_the_base_rate_and_says_so(changes):
    found = asked(calibration(events={"adapters": (event(**changes),), "task": ()}))
    assert found.chances[0].probability == 0.6
    assert not found.chances[0].predicted
    assert "predicts better than how often it happened" in found.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model": "someone/else"}, "adapters of tiny and none of else"),
        ({"base_model": None}, "none of an unnamed model"),
        (
            {"measures": {"held_out": -0.5, "rows": 4.0}},
            r"number of rows \(log2 of it over 64\) is 4, and -2 to 2 was seen",
        ),
    ],
)
def test_what_was_never_seen_is_unknown(changes, reason):
    found = asked(**changes)
    assert found.answer == "unknown"
    assert found.chances[0].probability is None
    assert found.text.startswith("Unknown.")
    assert re.search(reason, found.text)


def test_measures_of_adapters():
    similarity = torch.full((5, 5), 0.2).fill_diagonal_(1.0).tolist()
    found = measures_of_adapters([0.0] * 7 + [0.101], [0.0] * 7 + [0.001], similarity, n_rows=16)
    assert found == pytest.approx({"held_out": -1.0, "adapters": -2.0, "pair_cosine": 0.2, "rows": -2.0})


def test_the_answers_survive_json(tmp_path):
    made = make_collection(tmp_path, n_adapters=6, modules=MODULES, rank=2, n_shared=4, noise=0.1, seed=0)
    report = audited(made.folder)
    again = type(report).from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert (again.compress, again.train, again.reuse) == (report.compress, report.train, report.reuse)
    assert report.reuse.answer == "not asked"


@pytest.mark.parametrize("text", ["{", "{}", '{"source": 1}'])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not a calibration"):
        load_calibration(tmp_path / "c.json")


def test_the_shipped_calibration_is_read():
    found = load_calibration()
    assert set(found.events) == set(found.seen) == {"adapters", "task"}
