"""recipe: every recipe of the project can be listed and copied; nothing is replaced without --overwrite."""

import json
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def test_all_are_listed_with_a_line_each(run):
    listed = json.loads(run("recipe", "--json").out)
    assert set(listed) == {path.stem for path in RECIPES.glob("*.py")}
    assert all(line.endswith(".") for line in listed.values())
    assert "classification  " in run("recipe").out


def test_one_is_copied_with_its_settings(run, tmp_path):
    assert run("recipe", "sft", "--to", tmp_path / "new").code == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"sft.py", "sft.yaml", "sft_smollm2.yaml"}
    assert (tmp_path / "new" / "sft.py").read_bytes() == (RECIPES / "sft.py").read_bytes()
    (tmp_path / "new" / "sft.py").write_text("mine")
    again = run("recipe", "sft", "--to", tmp_path / "new")
    assert again.code == 1
    assert "exists; pass --overwrite" in again.err
    assert (tmp_path / "new" / "sft.py").read_text() == "mine"
    assert run("recipe", "sft", "--to", tmp_path / "new", "--overwrite").code == 0
    assert (tmp_path / "new" / "sft.py").read_bytes() == (RECIPES / "sft.py").read_bytes()


def test_an_installation_without_recipes_is_one_message(run, tmp_path, monkeypatch):
    run("recipe")
    monkeypatch.setattr("eigenpeft.cli.recipe._PLACES", (tmp_path,))
    ran = run("recipe", "sft")
    assert (ran.code, "came without its recipes; install the wheel, or clone it" in ran.err) == (1, True)


def test_an_unknown_name_is_one_message(run):
    ran = run("recipe", "stf")
    assert ran.code == 1
    assert "There is no recipe 'stf'; the recipes are build_subspace, classification" in ran.err
