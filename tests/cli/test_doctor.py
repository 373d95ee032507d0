"""`eigenpeft doctor`: what is here, what is missing, what does not fit, in a table and in JSON."""

import importlib
import json
from importlib.metadata import version as real_version

import peft
import pytest

from eigenpeft.cli import doctor


def checks(run, *flags):
    ran = run("doctor", "--json", *flags)
    answer = json.loads(ran.out)
    return ran.code, answer["ok"], {check["name"]: check for check in answer["checks"]}


def test_this_environment_is_sound(run):
    code, ok, found = checks(run)
    assert (code, ok) == (0, True)
    assert found["peft"] == {"name": "peft", "status": "ok", "found": peft.__version__, "advice": ""}
    assert found["methods known to PEFT"]["found"] == "EIGENLORA, MOSLORA"
    assert "EIGENLORA, MOSLORA" in run("doctor").out


def test_an_old_requirement_is_an_error_with_its_command(run, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "safetensors" else real_version(name))
    code, ok, found = checks(run)
    assert (code, ok) == (1, False)
    assert found["safetensors"]["status"] == "error"
    assert found["safetensors"]["advice"].startswith("pip install 'safetensors>=")


@pytest.mark.parametrize(("transformers", "status"), [("5.23.0", "ok"), ("5.24.0", "warning")])
def test_transformers_that_want_an_unreleased_peft(run, monkeypatch, transformers, status):
    faked = {"transformers": transformers, "peft": "0.21.2"}
    monkeypatch.setattr(doctor, "version", lambda name: faked.get(name) or real_version(name))
    code, _, found = checks(run)
    assert found["transformers' own add_adapter"]["status"] == status
    assert code == 0
    assert checks(run, "--strict")[0] == (1 if status == "warning" else 0)


@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (ModuleNotFoundError("No module named 'hqq'", name="hqq"), "missing", "not installed"),
        (ModuleNotFoundError("No module named 'termcolor'", name="termcolor"), "warning", "needs termcolor"),
        (OSError("libcudart.so.12: cannot open shared object file"), "warning", "libcudart"),
    ],
)
def test_a_back_end_that_does_not_import_is_named(run, monkeypatch, failure, status, text):
    real = importlib.import_module

    def refuse(name):
        if name == "hqq":
            raise failure
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    check = checks(run)[2]["hqq (quantisation)"]
    assert check["status"] == status
    assert text in check["found"]
