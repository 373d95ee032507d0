"""Runs a recipe as its command line says, in this process, in a folder with tiny models and data."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.factories import make_collection

RECIPES = Path(__file__).parents[2] / "recipes"
collect_ignore_glob = [] if find_spec("trl") else ["*"]


@pytest.fixture
def recipe(monkeypatch, capsys, tmp_path):
    """`recipe("sft", "--subspace", folder)` returns what it printed; the YAML beside the recipe is read first."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        command = [RECIPES / f"{name}.py"]
        if "--config" not in arguments and (RECIPES / f"{name}.yaml").exists():
            command += ["--config", RECIPES / f"{name}.yaml"]
        monkeypatch.setattr(sys, "argv", [*map(str, command), *map(str, arguments)])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def adapters(tmp_path):
    """Five adapters of ranks 2 and 4 in `tmp_path / "adapters"`."""
    return make_collection(tmp_path / "adapters", rank=(2, 4), n_shared=6, noise=0.05)
