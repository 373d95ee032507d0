"""The commands doctor and merge-base."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eigenpeft import EigenLoraConfig
from eigenpeft.cli import doctor as doctor_module
from eigenpeft.cli import load
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train


@pytest.fixture
def run():
    def call(*words):
        result = CliRunner().invoke(load(), [str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def test_doctor_tells_versions_and_back_ends(run):
    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"]["version"] == torch.__version__
    assert set(found["back_ends"]) >= {"bitsandbytes", "hqq"}
    assert "peft" in run("doctor").stdout


def test_doctor_and_the_project_file_have_the_same_lower_bounds():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"([a-z_]+)>=([\d.]+)"', project))
    told = {name: oldest for name, oldest, _ in doctor_module.PACKAGES if name in bounds}
    assert told == {name: bounds[name] for name in told}
    assert {"torch", "peft", "transformers", "accelerate", "datasets", "trl", "matplotlib"} <= set(told)


def test_the_lower_bounds_leave_room_for_what_flower_asks_for():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"([a-z_]+)>=([\d.]+)"', project))
    below = {"typer": "0.21", "rich": "15"}  # of flwr 1.42, which the extra `federated` installs
    assert all(Version(bounds[name]) < Version(limit) for name, limit in below.items())


def test_doctor_names_an_old_and_a_missing_package(run, monkeypatch):
    real = doctor_module.installed
    monkeypatch.setattr(
        doctor_module, "installed", lambda name: {"peft": "0.9", "datasets": None}.get(name, real(name))
    )
    result = run("doctor", "--json", "--strict")
    assert result.exit_code == 1
    problems = " ".join(json.loads(result.stdout)["problems"])
    assert "peft 0.9 is older than 0.21" in problems
    assert "datasets is not installed" in problems


def test_doctor_says_which_extra_an_absent_package_is_in(run, monkeypatch):
    real = doctor_module.installed
    monkeypatch.setattr(doctor_module, "installed", lambda name: None if name in ("trl", "matplotlib") else real(name))
    shown = "".join(run("doctor").stdout.replace("│", "").split())
    assert "'eigenpeft[trl]'" in shown
    assert "'eigenpeft[plots]'" in shown


def test_doctor_tells_when_transformers_wants_a_newer_peft(monkeypatch):
    integration = SimpleNamespace(MIN_PEFT_VERSION="99.0")
    monkeypatch.setattr(doctor_module.importlib, "import_module", lambda name: integration)
    assert any("peft >= 99.0" in problem for problem in doctor_module.examine()["problems"])


def test_merge_base_gives_the_adapted_models_logits(run, tmp_path):
    tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    random_subspace(base, ("q_proj", "v_proj")).save_pretrained(tmp_path / "subspace")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=4, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    run("merge-base", tmp_path / "adapter", "--out", tmp_path / "merged", "--json")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged.eval(), tokens), expected, atol=1e-5, rtol=1e-4)
