"""The table of commands is complete, and what needs no library is answered without one."""

import subprocess
import sys
from importlib import import_module

import pytest
from typer.main import get_command

from eigenpeft.cli import COMMANDS, SHORT_HELP, load
from eigenpeft.version import __version__

PARTS = {"peft", "transformers", "datasets"}


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


def test_the_list_of_commands_says_what_their_help_says():
    root = get_command(load())
    assert {name: command.help.strip().partition("\n")[0] for name, command in root.commands.items()} == SHORT_HELP


@pytest.mark.parametrize(
    ("command", "libraries"), [("build", PARTS), ("store", PARTS), ("audit", {"peft", "datasets"})]
)
def test_what_needs_no_peft_does_not_import_it(command, libraries):
    script = (
        f"import sys; sys.argv = ['eigenpeft', {command!r}, '--help']\n"
        "from eigenpeft.cli import main\n"
        f"try:\n    main()\nfinally:\n    assert not {libraries!r} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    assert f"Usage: eigenpeft {command}" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, __version__),
        (["--help"], 0, "Stores of many adapters in one subspace"),
        ([], 2, "Usage: eigenpeft"),
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
