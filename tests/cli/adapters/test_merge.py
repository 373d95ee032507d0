"""The command merge: what it writes, its recipe, and bad input of every kind with nothing left on disk."""

import json

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from eigenpeft import merge
from tests.factories import random_factors, write_adapter


def test_a_folder_becomes_one_plain_lora(run, adapters, tmp_path):
    ran = run("merge", adapters.folder, "--rule", "tsv", "--rank", "3", "--out", tmp_path / "merged")
    assert ran.code == 0, ran.err
    assert "TSV-M of 5 adapters: rank 3" in ran.out
    config = LoraConfig.from_pretrained(tmp_path / "merged")
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (3, 3, {}, {})
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["rule"] == "tsv"
    assert [source["name"] for source in report["sources"]] == adapters.names
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "arXiv 2412.00081" in card
    assert "adapter-4" in card
    assert "Rank and scaling" in card


def test_json_is_the_report(run, adapters, tmp_path):
    ran = run("merge", adapters.folder, "--option", "density=0.5", "--rule", "ties", "--out", tmp_path / "m", "--json")
    report = json.loads(ran.out)
    assert report["options"] == {"density": 0.5, "agreement": "mean"}
    assert report["path"] == str(tmp_path / "m")
    assert len(report["cosines"]) == 5


def test_weights_scales_and_calibrations_are_those_of_the_function(run, adapters, tmp_path):
    arguments = ["--weight", "adapter-1=-0.5", "--weight", "adapter-2=2", "--scale", "auto", "--calibrate", "svc"]
    ran = run("merge", adapters.folder, *arguments, "--rank", "4", "--out", tmp_path / "m")
    assert ran.code == 0, ran.err
    weights = dict.fromkeys(adapters.names, 1.0) | {"adapter-1": -0.5, "adapter-2": 2.0}
    expected = merge(adapters.folder, weights=weights, scale="auto", calibrate=["svc"], rank=4, progress=False)
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    for module, (lora_B, lora_A) in expected.factors.items():
        found = (
            tensors[f"base_model.model.{module}.lora_B.weight"] @ tensors[f"base_model.model.{module}.lora_A.weight"]
        )
        assert (found - lora_B @ lora_A).norm() < 1e-5 * found.norm()


RECIPE = """
rule: dare_ties
rank: 3
seed: 5
options: {drop: 0.2}
adapters:
  - {path: adapters/adapter-0, weight: 1.0}
  - {path: adapters/adapter-3, weight: -0.3}
  - adapters/adapter-1
"""


def test_a_recipe_says_all_of_it(run, adapters, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ran = run("merge", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "merged", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert {source["name"]: source["weight"] for source in report["sources"]} == {
        "adapter-0": 1.0,
        "adapter-3": -0.3,
        "adapter-1": 1.0,
    }
    assert (report["rule"], report["rank"], report["options"]["drop"]) == ("dare_ties", 3, 0.2)


def recipe(text):
    def write(tmp_path):
        (tmp_path / "recipe.yaml").write_text(text)

    return write


# Arguments besides --out, what is done before, and what the message must say.
BAD = {
    "no such folder": (["nowhere"], None, "nowhere"),
    "nothing named": ([], None, "Name adapters, or a --recipe"),
    "unknown rule": (["adapters", "--rule", "average"], None, "--rule average is unknown"),
    "density out of range": (["adapters", "--rule", "ties", "--option", "density=2"], None, "density=2"),
    "density that is no number": (
        ["adapters", "--rule", "ties", "--option", "density=much"],
        None,
        "density='much' must be a number",
    ),
    "an option of another rule": (
        ["adapters", "--rule", "tsv", "--option", "density=0.2"],
        None,
        "is not an option of",
    ),
    "an option without a value": (["adapters", "--option", "density"], None, "must be written NAME=VALUE"),
    "weight of nobody": (["adapters", "--weight", "nobody=1"], None, "['nobody'] are not among them"),
    "weight that is no number": (["adapters", "--weight", "adapter-0=big"], None, "'big' must be a number"),
    "rank above what is there": (["adapters", "--rank", "500"], None, "--rank 500 is too large"),
    "rank of zero": (["adapters", "--rank", "0"], None, "--rank 0 must be None or a whole number"),
    "scale that is no number": (["adapters", "--scale", "much"], None, "--scale 'much' must be a number"),
    "scales without rows": (["adapters", "--scale", "0.1,0.2"], None, "several scales and a score"),
    "regmean without statistics": (["adapters", "--rule", "regmean"], None, "needs statistics of each task's inputs"),
    "no statistics there": (
        ["adapters", "--rule", "regmean", "--statistics", "adapters"],
        None,
        "No statistics can be read",
    ),
    "head of nobody": (["adapters", "--head", "adapter-0"], None, "--head adapter-0 is not one of []"),
    "DoRA": (
        ["adapters"],
        lambda tmp: write_adapter(tmp / "adapters" / "dora", random_factors(), use_dora=True),
        "DoRA also rescales",
    ),
    "different bases": (
        ["adapters"],
        lambda tmp: write_adapter(tmp / "adapters" / "other", random_factors(), base_model_name_or_path="other/base"),
        "2 different base models",
    ),
    "biases": (
        ["adapters"],
        lambda tmp: write_adapter(
            tmp / "adapters" / "biased",
            random_factors(),
            extra={"base_model.model.layer.0.query.bias": random_factors()["layer.0.query"][0][:, 0].contiguous()},
        ),
        "biases of the base model",
    ),
    "a recipe that is not YAML": (["--recipe", "recipe.yaml"], recipe("adapters: ["), "cannot be read"),
    "a recipe without adapters": (["--recipe", "recipe.yaml"], recipe("rule: tsv"), "lists no adapters"),
    "a recipe with another word": (
        ["--recipe", "recipe.yaml"],
        recipe("adapters: [adapters/adapter-0]\nmodels: []"),
        "has 'models', which means nothing here",
    ),
    "a recipe with a weight in words": (
        ["--recipe", "recipe.yaml"],
        recipe("adapters: [{path: adapters/adapter-0, weight: half}]"),
        "a weight that is a number",
    ),
    "a weight for a folder of several": (
        ["--recipe", "recipe.yaml"],
        recipe("adapters: [{path: adapters, weight: 0.5}]"),
        "The recipe lists 1 adapters, in whose folders 5 were found; name each.",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(kind, run, adapters, tmp_path, monkeypatch):
    arguments, change, message = BAD[kind]
    if change is not None:
        change(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    ran = run("merge", *arguments, "--out", tmp_path / "out")
    assert ran.code == 1
    assert message in ran.err.replace("\n", " ")
    assert ran.err.startswith("Error:")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_one_adapter_is_reduced(run, adapters, tmp_path):
    ran = run("merge", adapters.folder / "adapter-1", "--rank", "2", "--out", tmp_path / "smaller")
    assert ran.code == 0, ran.err
    assert "1 adapters: rank 2" in ran.out
