"""Every Python code block of README and docs runs, page by page, and every docstring example too."""

import doctest
import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import eigenpeft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def modules_with_doctests():
    for info in pkgutil.walk_packages(eigenpeft.__path__, "eigenpeft."):
        needs_vllm = info.name == "eigenpeft.engines.vllm_hooks"  # imported by vLLM, which is an extra
        needs_flower = info.name.startswith("eigenpeft.federated")  # an extra, too
        lacks = (needs_vllm and find_spec("vllm") is None) or (needs_flower and find_spec("flwr") is None)
        if not info.name.endswith("__main__") and not lacks:
            yield info.name


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", modules_with_doctests())
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_readme_shows_code():
    assert blocks(ROOT / "README.md")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
