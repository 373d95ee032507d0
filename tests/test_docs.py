"""Every Python code block of README and docs runs, page by page, and every docstring example too."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner

import eigenpeft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PRINTED = re.compile(r"^```text\n(.*?)^```", re.M | re.S)
IMPORT = re.compile(r"(import|from) ")


# Modules that import an extra, and are left out where it is not installed.
NEEDS = {
    "eigenpeft.cli.training.trl_arguments": "trl",
    "eigenpeft.engines.vllm_hooks": "vllm",
    "eigenpeft.federated": "flwr",
    "eigenpeft.trainers.collator": "trl",
    "eigenpeft.trainers.lore_config": "trl",
    "eigenpeft.trainers.lore_trainer": "trl",
}
HAS_TRL = find_spec("trl") is not None


def modules_with_doctests():
    for info in pkgutil.walk_packages(eigenpeft.__path__, "eigenpeft."):
        needed = [extra for name, extra in NEEDS.items() if f"{info.name}.".startswith(f"{name}.")]
        if not info.name.endswith("__main__") and all(find_spec(extra) for extra in needed):
            yield info.name


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", modules_with_doctests())
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


# Public things whose example is a page of the docs, where it runs: each needs a trained model or data.
SHOWN_ON_A_PAGE = {"ZerothOrderTrainer": "zeroth-order"}
# What no example can run in seconds, and why.
WITHOUT_EXAMPLE = {
    "LoReTrainer": "trains a reward model with TRL",
    "export_gguf": "needs the package gguf",
    "recycle": "trains a dozen models",
    "sync_adapters": "needs a server",
}


def public_things():
    """Every class and function that a package lists in `__all__`, once."""
    found = {}
    for name in modules_with_doctests():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()) if hasattr(module, "__path__") else ():
            thing = getattr(module, public)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


def needs_no_example(thing) -> bool:
    """Whether nobody calls it: records that functions return, named tuples, and the tuners that `get_peft_model` makes."""
    if not inspect.isclass(thing):
        return False
    is_record = dataclasses.is_dataclass(thing) and not issubclass(thing, LoraConfig)
    return is_record or issubclass(thing, (tuple, BaseTuner))


@pytest.mark.skipif(not HAS_TRL, reason="needs the extra trl, whose names eigenpeft.trainers lists")
def test_every_public_thing_has_an_example_that_runs():
    things = public_things()
    assert len(things) > 150
    without = []
    for name, thing in things.items():
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
        own = re.compile(rf"\b{name.rpartition('.')[2]}\b")
        running = [
            each.source for each in examples if doctest.SKIP not in each.options and not IMPORT.match(each.source)
        ]
        runs = any(own.search(source) for source in running)
        if not runs and not needs_no_example(thing):
            without.append(name.rpartition(".")[2])
    assert sorted(without) == sorted([*SHOWN_ON_A_PAGE, *WITHOUT_EXAMPLE])


@pytest.mark.parametrize(("name", "page"), SHOWN_ON_A_PAGE.items())
def test_what_is_shown_on_a_page_is_used_there(name, page):
    path = next(path for path in PAGES if path.stem == page)
    assert re.search(rf"\b{name}\b", "\n".join(blocks(path)))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    if page.name == "README.md":
        printed = capsys.readouterr().out.splitlines()
        verdict, counts = PRINTED.findall(page.read_text(encoding="utf-8"))[0].splitlines()
        assert verdict.endswith(" ...")
        assert any(line.startswith(verdict.removesuffix("...")) for line in printed), printed
        assert counts in printed


def test_readme_shows_code_and_what_it_prints():
    assert blocks(ROOT / "README.md")
    assert len(PRINTED.findall((ROOT / "README.md").read_text(encoding="utf-8"))) == 1


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
