"""The table of commands is complete, and what needs no library is answered without one."""

import subprocess
import sys
from importlib import import_module

import pytest

from eigenpeft.cli import COMMANDS
from eigenpeft.version import __version__


def test_the_table_has_every_command_at_its_place():
    for module in set(COMMANDS.values()):
        import_module(f"eigenpeft.cli.{module}")
    app = import_module("eigenpeft.cli.app").app
    made = {
        command.name or command.callback.__name__.replace("_", "-"): command.callback
        for command in app.registered_commands
    }
    made |= {group.name: None for group in app.registered_groups}
    assert set(made) == set(COMMANDS)
    for name, callback in made.items():
        if callback is not None:
            assert callback.__module__ == f"eigenpeft.cli.{COMMANDS[name]}", name


@pytest.mark.parametrize("command", ["build", "store"])
def test_what_needs_no_peft_does_not_import_it(command):
    script = (
        f"import sys; sys.argv = ['eigenpeft', {command!r}, '--help']\n"
        "from eigenpeft.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'peft', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    assert f"Usage: eigenpeft {command}" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, __version__),
        (["biuld", "adapters"], 2, "there is no command 'biuld'. Did you mean 'build'?"),
    ],
)
def test_answers_without_torch(arguments, code, words):
    script = (
        f"import sys; sys.argv = ['eigenpeft', *{arguments!r}]\n"
        "from eigenpeft.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert ran.returncode == code
    assert words in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
