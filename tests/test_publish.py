"""Publishing: what would be sent, what a card says, and what is refused because others could not load it."""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft import (
    AdapterCollection,
    AdapterStore,
    EigenLoraConfig,
    LowRankRewardModel,
    MosLoraConfig,
    SubspaceBuilder,
)
from eigenpeft.artifacts.plain_text import for_card
from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.errors import ArtifactError
from eigenpeft.publish import prepare, push
from tests.factories import make_collection
from tests.tuners.conftest import logits, random_subspace, tiny_llama

BASE = "owner/base"
TOKENS = torch.arange(3, 21).reshape(2, 9)
# PEFT looks for the base model's config on the Hub when it saves; here it is offline.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the Hub would have received: nothing leaves this machine."""
    received = tmp_path / "received"

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        shutil.copytree(folder_path, received, ignore=shutil.ignore_patterns(*ignore_patterns))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return received


def save_adapter(folder, config):
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1  # off its start, or the base would answer alike
    for each in model.peft_config.values():
        each.base_model_name_or_path = BASE
    model.save_pretrained(folder)
    return model


def test_a_subspace_and_a_store_are_sent_with_their_cards(tmp_path, hub):
    make_collection(tmp_path / "adapters", rank=4, n_shared=6)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        subspace = SubspaceBuilder(4).fit(collection).subspace_
        AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
    subspace.save_pretrained(tmp_path / "subspace")
    assert prepare(tmp_path / "subspace", repo_id="me/bases").kind == "subspace"
    assert push(prepare(tmp_path / "store", repo_id="me/store")) == "https://hub/me/store/commit/1"
    assert sorted(file.name for file in hub.iterdir()) == [
        "README.md",
        "members",
        "members.index",
        "store_config.json",
        "subspace.safetensors",
        "subspace_config.json",
    ]
    assert len(AdapterStore.from_pretrained(hub)) == len(collection)
    card = ModelCard.load(hub / "README.md")
    assert card.data.library_name == "eigenpeft"
    assert 'from_pretrained("me/store")' in card.text


@pytest.mark.parametrize("method", ["eigenlora", "moslora", "lora"])
def test_an_adapter_is_sent_with_a_complete_card(tmp_path, hub, method):
    common = {"r": 2, "task_type": "CAUSAL_LM"}
    config = {
        "eigenlora": lambda: EigenLoraConfig(subspace=random_subspace(tiny_llama(), ["q_proj"]), **common),
        "moslora": lambda: MosLoraConfig(target_modules=["q_proj"], **common),
        "lora": lambda: LoraConfig(target_modules=["q_proj"], **common),
    }[method]()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"not to be sent")
    model = save_adapter(tmp_path / "adapter", config)
    push(prepare(tmp_path / "adapter", repo_id="me/task"))
    assert sorted(file.name for file in hub.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = ModelCard.load(hub / "README.md")
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    assert "[More Information Needed]" not in card.text
    assert ("import eigenpeft" in card.text) == (method != "lora")
    assert '"me/task"' in card.text
    assert "| r | `2` |" in card.text
    assert logits(PeftModel.from_pretrained(tiny_llama(), hub).eval(), TOKENS).equal(logits(model.eval(), TOKENS))


def test_a_card_somebody_wrote_is_kept_and_told_how_to_load(tmp_path):
    save_adapter(tmp_path / "adapter", MosLoraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "adapter" / "README.md").write_text("# Mine\n\nTrained on poems.\n")
    card = prepare(tmp_path / "adapter", repo_id="me/task").card
    assert card.startswith("# Mine\n\nTrained on poems.\n")
    assert "import eigenpeft" in card


def test_local_places_are_refused_and_can_be_replaced(tmp_path, hub):
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    subspace.save_pretrained(tmp_path / "subspace")
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=2))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="local base model .* pass base_model"):
        prepare(tmp_path / "adapter", repo_id="me/task")
    with pytest.raises(ArtifactError, match="local subspace .* publish that first"):
        prepare(tmp_path / "adapter", repo_id="me/task", base_model=BASE)
    push(prepare(tmp_path / "adapter", repo_id="me/task", base_model=BASE, subspace="me/bases"))
    config = json.loads((hub / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["subspace"]) == (BASE, "me/bases")
    assert config["subspace_sha256"] == subspace.fingerprint
    assert str(tmp_path) not in (hub / "README.md").read_text()
    assert str(tmp_path) in (tmp_path / "adapter" / "adapter_config.json").read_text()  # the folder is left alone


def test_what_cannot_be_published_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no subspace_config\.json"):
        prepare(tmp_path / "empty", repo_id="me/task")
    with pytest.raises(ArtifactError, match="is not OWNER/NAME"):
        prepare(tmp_path / "empty", repo_id="a/b/c")
    save_adapter(tmp_path / "adapter", MosLoraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no adapter_model\.safetensors"):
        prepare(tmp_path / "adapter", repo_id="me/task")
    random_subspace(tiny_llama(), ["q_proj"]).save_pretrained(tmp_path / "subspace")
    (tmp_path / "subspace" / "README.md").unlink()
    with pytest.raises(ArtifactError, match="save the subspace again"):
        prepare(tmp_path / "subspace", repo_id="me/bases")
    with pytest.raises(ArtifactError, match="holds no reward model; leave out with_users"):
        prepare(tmp_path / "subspace", repo_id="me/bases", with_users=True)


def test_the_card_embeds_an_audit(tmp_path, hub):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    make_collection(tmp_path / "adapters", n_adapters=5, rank=4, n_shared=6)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        subspace = SubspaceBuilder(4).fit(collection).subspace_
        AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
        report = audit_adapters(collection, n_components=6, progress=False)
    subspace.save_pretrained(tmp_path / "subspace")
    assert "audit.png" in prepare(tmp_path / "store", repo_id="me/store", audit=report).card
    push(prepare(tmp_path / "subspace", repo_id="me/bases", audit=report))
    assert (hub / "audit.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(hub / "README.md")
    assert "](audit.png)" in card.text
    for question, _, text in report.answers:
        assert f"**{question}** {for_card(text)}" in card.text
    assert f"A detail: {report.verdict}." in card.text
    for k in (1, 4, 6):
        assert f"| {k} | {report.explained.real[k - 1]:.3f} |" in card.text
    assert card.text.index("## What can be done with these adapters?") < card.text.index("## Modules")
    assert "audit.png" not in (tmp_path / "subspace" / "README.md").read_text()  # the folder is left alone


def test_an_audit_of_other_adapters_is_refused(tmp_path):
    for folder, prefix in (("adapters", "a"), ("others", "b")):
        made = make_collection(tmp_path / folder, n_adapters=4, rank=4, n_shared=6)
        for each in list(made.folder.iterdir()):
            each.rename(made.folder / f"{prefix}-{each.name}")
    SubspaceBuilder(4).fit(AdapterCollection.from_pretrained(tmp_path / "adapters")).subspace_.save_pretrained(
        tmp_path / "subspace"
    )
    report = audit_adapters(AdapterCollection.from_pretrained(tmp_path / "others"), n_components=4, progress=False)
    with pytest.raises(ArtifactError, match=r"audit is of other adapters: 'b-.* \(4 of 4\)"):
        prepare(tmp_path / "subspace", repo_id="me/bases", audit=report)
    save_adapter(tmp_path / "adapter", MosLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ArtifactError, match="is one adapter; an audit goes with"):
        prepare(tmp_path / "adapter", repo_id="me/task", audit=report)


def test_a_report_comes_back_from_json(tmp_path):
    made = make_collection(tmp_path, n_adapters=4, rank=4, n_shared=6)
    report = audit_adapters(AdapterCollection.from_pretrained(made.folder), n_components=4, progress=False)
    assert AuditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    with pytest.raises(ArtifactError, match="it has no advice"):
        AuditReport.from_dict({key: value for key, value in report.to_dict().items() if key != "advice"})
    with pytest.raises(ArtifactError, match="is damaged"):
        AuditReport.from_dict({**report.to_dict(), "findings": [{"kind": "related"}]})


def reward_model(folder):
    model = LowRankRewardModel(torch.eye(2, 5))
    model.users.put(["person-77"], user_weights=torch.tensor([[0.75, 0.25]]), n_pairs=[3])
    model.save_pretrained(folder)
    return model


def test_a_reward_model_is_sent_without_its_users_unless_asked(tmp_path, hub):
    model = reward_model(tmp_path / "rewards")
    publication = prepare(tmp_path / "rewards", repo_id="me/rewards", license="mit")
    assert publication.kind == "reward model"
    push(publication)
    received = LowRankRewardModel.from_pretrained(hub)
    assert torch.equal(received.reward_basis, model.reward_basis)
    assert list(received.users) == []
    assert "weights were not published" in (hub / "README.md").read_text()
    assert "1 users" not in (hub / "README.md").read_text()
    assert b"person-77" not in b"".join(file.read_bytes() for file in hub.iterdir())
    assert ModelCard.load(hub / "README.md").data.license == "mit"
    shutil.rmtree(hub)
    push(prepare(tmp_path / "rewards", repo_id="me/rewards", with_users=True))
    assert list(LowRankRewardModel.from_pretrained(hub).users) == ["person-77"]
    with pytest.raises(ArtifactError, match="holds a reward model; leave out base_model"):
        prepare(tmp_path / "rewards", repo_id="me/rewards", base_model=BASE)


def test_the_license_is_the_publishers(tmp_path, hub):
    save_adapter(tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    push(prepare(tmp_path / "adapter", repo_id="me/adapter", license="apache-2.0"))
    assert ModelCard.load(hub / "README.md").data.license == "apache-2.0"
    with pytest.raises(ArtifactError, match="holds no reward model; leave out with_users"):
        prepare(tmp_path / "adapter", repo_id="me/adapter", with_users=True)
