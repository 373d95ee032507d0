"""Starting at the first trained layer gives the logits and the gradients of the whole model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft.demo.trunk import Trunk, first_trained_layer, padded, resumed
from tests.factories import tiny_bert

IDS = [[5, 9, 11], [7, 3, 4, 8, 20], [2, 6]]


def model_trained_from(first):
    base = tiny_bert(hidden_dropout_prob=0.0)
    n_layers = base.config.num_hidden_layers
    if first == n_layers:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
        return base.eval()
    config = LoraConfig(
        r=2, target_modules=["query"], layers_to_transform=list(range(first, n_layers)), task_type="SEQ_CLS"
    )
    config.init_lora_weights = False
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_logits_and_gradients_are_those_of_the_whole_model(first):
    model = model_trained_from(first)
    assert first_trained_layer(model) == first
    whole = model(**padded([IDS[i] for i in (1, 0, 2)])).logits
    whole.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    trunk = Trunk.of(model, IDS, first=first)
    assert trunk.lengths == [3, 5, 2]
    with resumed(model, first=first):
        logits = model(**trunk.batch([1, 0, 2])).logits
        logits.square().sum().backward()
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**padded([IDS[i] for i in (1, 0, 2)])).logits, whole)  # whole again
