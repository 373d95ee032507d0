"""The related adapters that ship: whole classifiers, related, and new customers that share no intent with them."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft import AdapterCollection
from eigenpeft.demo import new_customer, related_adapters
from eigenpeft.demo.assets import base_model
from eigenpeft.errors import EigenPeftError


def record():
    return json.loads((related_adapters() / "RECORD.json").read_text())


def test_the_collection_reads_all_of_them():
    collection = AdapterCollection.from_pretrained(related_adapters())
    assert list(collection.names) == [row["name"] for row in record()["adapters"]]
    assert len(collection) == 16
    assert len(collection.modules) == 12


def test_their_seeds_differ():
    assert len({row["seed"] for row in record()["adapters"]}) == 16


def test_new_customers_share_no_intent_with_the_adapters_or_each_other():
    seen = {intent for row in record()["adapters"] for intent in row["intents"]}
    new = [new_customer(number) for number in range(4)]
    fresh = [intent for customer in new for intent in customer.intents]
    assert len(fresh) == len(set(fresh)) == 32
    assert not seen & set(fresh)
    for customer in new:
        assert len(customer.train) == 64
        assert [row["label"] for row in customer.train[:8]] == list(range(8))
        assert {row["label"] for row in customer.test} == set(range(8))
        assert not {row["text"] for row in customer.train} & {row["text"] for row in customer.test}


@pytest.mark.parametrize("number", [4, -1, True, "0"])
def test_unknown_customers_are_refused(number):
    with pytest.raises(EigenPeftError, match="names no new customer; there are 4: 0 to 3"):
        new_customer(number)


@pytest.mark.parametrize("n_rows", [0, 1.5])
def test_a_number_of_rows_that_is_none_is_refused(n_rows):
    with pytest.raises(EigenPeftError, match="must be a whole number of at least 1"):
        new_customer(0, n_rows=n_rows)


@pytest.mark.slow
def test_an_adapter_with_its_head_is_a_classifier():
    row = record()["adapters"][0]
    base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=len(row["intents"]))
    model = PeftModel.from_pretrained(base, related_adapters() / row["name"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    # A question of the first class and one of the last, in the customer's own words rather than the data set's.
    texts = [intent.replace("_", " ") for intent in row["intents"]]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(1)
    assert (found == torch.arange(len(texts))).double().mean() >= 0.6
