"""The site: every page is in its navigation, every command and option on the page of the commands, and Chromium shows it."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from eigenpeft.cli import COMMANDS

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WORDS_OF_PAGES = {
    "index.html": "Recycle LoRA adapters",
    "audit/index.html": "What can be done with these adapters?",
    "commands/index.html": "eigenpeft store add",
    "reference/index.html": "EigenLoraConfig",
    "regimes/index.html": "When does recycling pay?",
}


def navigation():
    return re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)


def test_every_page_is_in_the_navigation_once():
    assert sorted(navigation()) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_page_of_the_commands_has_every_command_with_its_options():
    path = ROOT / "docs" / ".hooks" / "commands.py"
    spec = importlib.util.spec_from_file_location("commands_hook", path)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == hook.page(), "docs/commands.md is not what the commands say: run python docs/.hooks/commands.py"
    for name in COMMANDS:
        assert f"eigenpeft {name}" in page or f"`{name}`" in page, name
    for option in ("--n-components", "--weighting", "--recipe", "--replace", "--time-limit"):
        assert f"`{option}`" in page, option
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|")]
    without_text = [line for line in rows if re.search(r"\| *\|$", line)]
    assert len(rows) > 80
    assert without_text == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs MkDocs: make site")
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_built_site_opens_in_a_browser(tmp_path):
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    for page, expected in WORDS_OF_PAGES.items():
        shown = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (site / page).as_uri()],
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        ).stdout
        assert expected in shown, page
        for part in ("Guide", "Reference", "Results"):
            assert part in shown, (page, part)
    assert "Merge adapters" in (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for page in site.glob("**/*.html"):
        for target in re.findall(
            r'href="(?!https?:|mailto:|#|data:|javascript:)([^"#?]+)', page.read_text(encoding="utf-8")
        ):
            place = (page.parent / target).resolve() if not target.startswith("/") else site / target.lstrip("/")
            assert place.exists() or page.name == "404.html", f"{page.name} links to {target}"
