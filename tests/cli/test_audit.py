"""The audit command prints what the library measures, and writes figure and page whole."""

import json

import pytest

from eigenpeft.report import plots


def test_audit_says_it_in_words_and_in_json(run, adapters, tmp_path):
    shown = run("audit", adapters.folder, "-k", 8)
    assert shown.code == 0
    assert "held out" in shown.out
    assert "Shared." in shown.out
    report = json.loads(run("audit", adapters.folder, "-k", 8, "--json").out)
    assert report["verdict"] == "shared"
    assert set(report["modules"]) == set(adapters.components_in)


def test_audit_draws(run, adapters, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    result = run(
        "audit", adapters.folder, "-k", 8, "--plot", tmp_path / "a.png", "--html", tmp_path / "deep" / "a.html"
    )
    assert result.code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "deep" / "a.html").read_text()
    assert "data:image/png;base64," in page
    assert "adapter-3" in page
    assert "http" not in page.replace("http-equiv", "")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.html"]
    monkeypatch.setattr(plots, "Figure", None)
    refused = run("audit", adapters.folder, "-k", 8, "--plot", tmp_path / "b.png")
    assert refused.code == 1
    assert "pip install 'eigenpeft[plots]'" in refused.err


def test_audit_refuses(run, adapters, tmp_path):
    result = run("audit", adapters.folder / "adapter-0", "-k", 4)
    assert result.code == 1
    assert "at least 3" in result.err
