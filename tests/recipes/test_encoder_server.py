"""The encoder server: rows of several requests in one batch, each by its own adapter and head; members come and go."""

import runpy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from tests.recipes.conftest import RECIPES
from tests.recipes.tiny import tiny_tokenizer
from tests.tuners.conftest import tiny_bert

pytest.importorskip("uvicorn", reason="needs fastapi and uvicorn")
testclient = pytest.importorskip("fastapi.testclient", reason="needs fastapi and httpx")
LABELS = {"anna": 2, "bert": 3, "carla": 5}


@pytest.fixture
def place(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, n_labels) in enumerate([*LABELS.items(), ("late", 4)]):
        torch.manual_seed(seed)
        model = get_peft_model(
            tiny_bert(n_labels), LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        )
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapters" / name)
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        subspace = SubspaceBuilder(8).fit(collection).subspace_  # all directions: nothing is lost
    store = AdapterStore(subspace)
    for name in LABELS:
        store.add(tmp_path / "adapters" / name)
    store.save_pretrained(tmp_path / "store")
    return tmp_path


def server(place, **options):
    recipe = runpy.run_path(str(RECIPES / "encoder_server.py"))
    classifiers = recipe["Classifiers"](place / "base", place / "store", group_size=2)
    return testclient.TestClient(recipe["make_app"](classifiers, **options))


def test_rows_of_like_length_are_computed_together():
    by_length = runpy.run_path(str(RECIPES / "encoder_server.py"))["by_length"]
    assert by_length([5, 1, 9, 2, 5], size=2) == [[1, 3], [0, 4], [2]]
    assert by_length([], size=2) == []


@torch.no_grad()
def expected(place, name, text):
    model = PeftModel.from_pretrained(tiny_bert(LABELS.get(name, 4)), place / "adapters" / name).eval()
    tokens = tiny_tokenizer()(text, return_tensors="pt")
    probabilities = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits[0].softmax(-1)
    return {
        "member": name,
        "label": int(probabilities.argmax()),
        "probability": pytest.approx(float(probabilities.max()), abs=1e-4),
    }


def test_rows_of_several_requests_get_their_own_heads(place):
    texts = ["w1 w2 w3", "w7", "w4 w4 w9 w9"]
    requests = [
        [{"member": name, "text": text} for name in LABELS for text in texts],
        [{"member": "bert", "text": "w5"}],
    ]
    with server(place, batch_size=4, wait=0.05) as client, ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda rows: client.post("/classify", json={"rows": rows}), requests))
    for rows, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200
        assert answer.json() == [expected(place, row["member"], row["text"]) for row in rows]


def test_members_come_and_go_and_unknown_ones_are_not_found(place):
    with server(place, refresh=0.05) as client:
        assert client.get("/members").json() == list(LABELS)
        answer = client.post("/classify", json={"rows": [{"member": "ana", "text": "w1"}]})
        assert answer.status_code == 404
        assert "'ana' (did you mean 'anna'?)" in answer.json()["detail"]
        store = AdapterStore.from_pretrained(place / "store")
        store.add(place / "adapters" / "late")
        store.remove("bert")
        wanted = {"anna", "carla", "late"}
        for _ in range(600):
            if set(client.get("/members").json()) == wanted:
                break
            time.sleep(0.05)
        assert set(client.get("/members").json()) == wanted
        answer = client.post("/classify", json={"rows": [{"member": "late", "text": "w1 w2"}]})
        assert answer.json() == [expected(place, "late", "w1 w2")]
        assert client.post("/classify", json={"rows": [{"member": "bert", "text": "w1"}]}).status_code == 404
