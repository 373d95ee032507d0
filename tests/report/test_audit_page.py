"""The audit's page in a real browser: title, three answers with their tables, and a figure that is drawn."""

import base64
import io
import re
import shutil
import subprocess

import pytest

from eigenpeft import AdapterCollection
from eigenpeft.audit import audit_adapters
from eigenpeft.demo import related_adapters, shipped_adapters
from eigenpeft.report.audit_figure import write_page

pytest.importorskip("matplotlib", reason="needs the extra plots")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow, which the extra plots brings with matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TAB_BLUE = (31, 119, 180)


def opened(page, *, shot):
    """The page's DOM after a browser has opened it, and a picture of it."""
    headless = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2600"]
    dom = subprocess.run(
        [*headless, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=900
    )
    subprocess.run([*headless, f"--screenshot={shot}", page.as_uri()], capture_output=True, check=True, timeout=900)
    return dom.stdout, Image.open(shot).convert("RGB")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("which", ["shipped", "related", "gpt2"])
def test_a_browser_shows_title_answers_and_figure(which, tmp_path, request):
    if which == "gpt2":
        folder = request.getfixturevalue("real_adapters_dir")
    else:
        folder = {"shipped": shipped_adapters, "related": related_adapters}[which]()
    with AdapterCollection.from_pretrained(folder, allow_different_base_models=True) as collection:
        report = audit_adapters(collection, n_components=32, n_nulls=1, progress=False)
    write_page(report, tmp_path / "audit.html")
    dom, picture = opened(tmp_path / "audit.html", shot=tmp_path / "shot.png")
    assert f"<title>Audit of {len(report.adapters)} adapters</title>" in dom
    for question, _, text in report.answers:
        section = re.search(rf'<section id="{question.partition(":")[0].lower()}">(.*?)</section>', dom, re.DOTALL)[1]
        assert question in section
        assert text.split(".")[0] in section
    assert dom.index('id="compress"') < dom.index("<img") < dom.index("How much they share")
    figure = Image.open(io.BytesIO(base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", dom)[1])))
    assert figure.width > 1000
    assert "`" not in dom
    colors = {color for _, color in picture.getcolors(maxcolors=2**24)}
    assert any(all(abs(a - b) < 8 for a, b in zip(color, TAB_BLUE, strict=True)) for color in colors)
