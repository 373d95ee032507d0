"""Runs the command in this process, as the shell would."""

import sys
from dataclasses import dataclass

import pytest

from eigenpeft.cli import main
from tests.factories import make_collection


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("build", folder, "--out", out)`; a traceback would be this call's own exception."""

    def call(*arguments) -> Ran:
        monkeypatch.setattr(sys, "argv", ["eigenpeft", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return call


@pytest.fixture
def adapters(tmp_path):
    """Five adapters of ranks 2 and 4 in `tmp_path / "adapters"`."""
    return make_collection(tmp_path / "adapters", rank=(2, 4), n_shared=6, noise=0.05)
