"""Writes docs/commands.md anew below its mark: every command, its text, its arguments and its options, from the program itself.

python docs/.hooks/commands.py
"""

import re
from pathlib import Path

MARK = "<!-- Written by docs/.hooks/commands.py from here on. -->"
PAGE = Path(__file__).parents[1] / "commands.md"


def page() -> str:
    """The whole page: what stands before the mark, then a list of the commands, then each with its options."""
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{before}{MARK}\n\n{commands()}\n"


def commands() -> str:
    """Markdown of all commands; those of TRL are named alone, since their flags are TRL's."""
    import typer

    from eigenpeft.cli import TRL_SCRIPTS, load

    root = typer.main.get_command(load())
    own = {name: command for name, command in sorted(root.commands.items()) if name not in TRL_SCRIPTS}
    parts = ["\n".join(["| command | what it does |", "|---|---|", *_list(own)])]
    for name, command in own.items():
        parts += _command(f"eigenpeft {name}", command)
    scripts = ", ".join(f"`{name}`" for name in TRL_SCRIPTS)
    parts.append(
        f"## eigenpeft {' | '.join(TRL_SCRIPTS)}\n\nTRL's own scripts, {scripts}, with its flags and ours: see [TRL](trl.md) and "
        "`eigenpeft sft --help`."
    )
    return "\n\n".join(parts)


def _list(own):
    """A row per command and per command of a group, in the first sentence of its help."""
    for name, command in own.items():
        inner = getattr(command, "commands", None) or {}
        for word, one in {name: command, **{f"{name} {each}": inner[each] for each in sorted(inner)}}.items():
            first = (one.help or "").strip().partition("\n")[0]
            yield f"| [`{word}`](#eigenpeft-{word.replace(' ', '-')}) | {first} |"


def _command(name, command):
    if getattr(command, "commands", None):
        yield f"## {name}\n\n{_text(command)}"
        for own, inner in sorted(command.commands.items()):
            yield from (part.replace("## ", "### ", 1) for part in _command(f"{name} {own}", inner))
        return
    yield f"## {name}\n\n{_text(command)}"
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    yield "\n".join(["| argument or option | default | |", "|---|---|---|", *filter(None, rows)])


def _text(command):
    """The help text, its example as code."""
    text = re.sub(r"[ \t]+", " ", (command.help or "").strip())
    return re.sub(r"^(Example|Examples): (.+)$", r"```bash\n\2\n```", text, flags=re.M)


def _row(parameter):
    if parameter.name == "help":
        return None
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    default = "required" if parameter.required else _default(parameter)
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| {names} | {default} | {text} |"


def _default(parameter):
    value = parameter.default
    return "" if value is None or value is False or value in ((), []) or callable(value) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
