"""Fills the page of the commands with every command, its text, its arguments and its options, from the program itself."""

import re

MARK = "<!-- commands -->"


def on_page_markdown(markdown, **_):
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Markdown of all commands; those of TRL are named alone, since their flags are TRL's."""
    import typer

    from eigenpeft.cli import TRL_SCRIPTS, load

    parts = []
    root = typer.main.get_command(load())
    for name, command in sorted(root.commands.items()):
        if name not in TRL_SCRIPTS:
            parts += _command(f"eigenpeft {name}", command)
    scripts = ", ".join(f"`{name}`" for name in TRL_SCRIPTS)
    parts.append(
        f"## eigenpeft {' | '.join(TRL_SCRIPTS)}\n\nTRL's own scripts, {scripts}, with its flags and ours: see [TRL](trl.md) and "
        "`eigenpeft sft --help`."
    )
    return "\n\n".join(parts)


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
    return "" if value in (None, (), [], False) or callable(value) else f"`{value}`"
