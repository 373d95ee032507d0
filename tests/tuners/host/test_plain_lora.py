"""Importing eigenpeft leaves PEFT as it was for everybody who uses its own methods, errors included."""

import json
import os
import subprocess
import sys

import pytest

from eigenpeft.collection.formats.settings import OWN_METHODS

# Prints what PEFT does with its own methods, as JSON; imports eigenpeft first when told to.
SCENES = r"""
import hashlib, json, os, sys, tempfile
if sys.argv[1] == "with":
    import eigenpeft
import torch
from torch import nn
from peft import (
    IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model,
)
from peft.optimizers import create_lorafa_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

X = torch.arange(24.0).view(3, 8) / 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mixer = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.conv = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x):
        tokens = torch.arange(3)
        return self.conv((self.mixer(x) + self.embed(tokens)).view(1, 4, 2, 3))


def sha(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return digest.hexdigest()


def lora(r=2, **settings):
    torch.manual_seed(1)
    settings = {"target_modules": ["mixer", "embed"], "init_lora_weights": False} | settings
    return get_peft_model(Net(), LoraConfig(r=r, **settings))


def train(model, optimizer):
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sha(model.state_dict())


def plain():
    model = lora()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["mixer"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "svd")
    out = [repr(model), sha(model.state_dict()), sha({"y": model(X)})]
    model.merge_adapter(["default"])
    out.append(sha({"y": model(X)}))
    model.unmerge_adapter()
    out += [sha(model.state_dict()), sorted(model.peft_config["default"].to_dict().items(), key=str).__repr__()]
    return out + [sorted(get_peft_model_state_dict(model)), [c.__name__ for c in type(model.base_model).__mro__]]


def saved():
    model = lora(target_modules=["mixer"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(Net(), folder)
        files = {path: open(f"{folder}/{path}", "rb").read() for path in sorted(os.listdir(folder))}
        hotswap_adapter(loaded, folder, adapter_name="default")
        return sha(loaded.state_dict()), files


def beside(name):
    model = lora()
    model.add_adapter(name, LoraConfig(r=3, target_modules=["mixer"]))
    return sorted(get_peft_model_state_dict(model)), sorted(get_peft_model_state_dict(model, adapter_name=name))


def mixed():
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["mixer"], init_lora_weights=False)
    model = get_peft_model(Net(), config, mixed=True)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["mixer"], init_weights=False))
    model.set_adapter(["default", "other"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(model.base_model).__mro__]
    return repr(model), names, train(model, optimizer)


def mixed_error(what):
    configs = {"ia3": IA3Config(target_modules=["mixer"], feedforward_modules=[]), "none": None}
    return get_peft_model(Net(), configs[what], mixed=True)


def padded(rank, **settings):
    model = lora(**settings)
    prepare_model_for_compiled_hotswap(model, target_rank=rank)
    return repr(model), sha(model.state_dict()), sha({"y": model(X)})


def lorafa():
    model = lora(target_modules=["mixer"])
    return train(model, create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1))


def lorafa_of(params, **settings):
    made = LoraFAOptimizer(params() if callable(params) else params, **settings)
    return [{k: v for k, v in group.items() if k != "params"} | {"n": len(group["params"])} for group in made.param_groups]


def one():
    return nn.Parameter(torch.ones(2, 2))


SCENES = {
    "plain": plain,
    "saved": saved,
    "saved beside another adapter": lambda: beside("other"),
    "saved beside an adapter called as a module is": lambda: beside("mixer"),
    "mixed": mixed,
    "mixed with a method that cannot be": lambda: mixed_error("ia3"),
    "mixed with nothing": lambda: mixed_error("none"),
    "injected": lambda: repr(inject_adapter_in_model(LoraConfig(target_modules=["mixer"]), Net())),
    "padded": lambda: padded(5),
    "padded to less": lambda: padded(1),
    "padded groups": lambda: padded(4, target_modules=["conv"]),
    "padded groups that do not fit": lambda: padded(5, target_modules=["conv"]),
    "padded no adapter": lambda: prepare_model_for_compiled_hotswap(Net(), target_rank=4),
    "padded nothing": lambda: prepare_model_for_compiled_hotswap(None, target_rank=4),
    "lorafa": lorafa,
    "lorafa of a list": lambda: lorafa_of([one(), one()], lr=0.5),
    "lorafa of a generator": lambda: lorafa_of(lambda: (p for p in [one()])),
    "lorafa of groups": lambda: lorafa_of([{"params": [one()], "names": ["model.mixer"], "lr": 0.25}]),
    "lorafa of groups with the names of others": lambda: lorafa_of([{"params": [one()], "names": ["a.factor", "b.coefficients"]}]),
    "lorafa of a tensor": lambda: lorafa_of(one()),
    "lorafa of nothing": lambda: lorafa_of(None),
    "lorafa of an empty list": lambda: lorafa_of([]),
    "lorafa with a bad rate": lambda: lorafa_of([one()], lr=-1.0),
}


def outcome(scene):
    try:
        return repr(scene())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps({name: outcome(scene) for name, scene in SCENES.items()}))
"""

# Prints which names and class attributes of PEFT's modules are other objects once eigenpeft is imported.
REPLACED = r"""
import json, sys
import peft, peft.mixed_model, peft.optimizers, peft.tuners.mixed, peft.utils.hotswap, transformers


def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and module is not None:
            for attribute, value in list(vars(module).items()):
                found[f"{name}.{attribute}"] = value
                if isinstance(value, type) and value.__module__.startswith("peft"):
                    place = f"{value.__module__}.{value.__qualname__}"
                    found |= {f"{place}.{key}": member for key, member in list(vars(value).items())}
    return found


before = snapshot()
import eigenpeft
after = snapshot()
print(json.dumps(sorted(name for name, value in before.items() if after.get(name) is not value)))
"""

REGISTRIES = {"peft.tuners.mixed.COMPATIBLE_TUNER_TYPES"}  # a list of methods, which has ours now
ACTS_FOR_OURS_ALONE = {
    "peft.optimizers.lorafa.LoraFAOptimizer.__init__",
    "peft.utils.hotswap._pad_lora_weights",
    "peft.utils.hotswap.hotswap_adapter_from_state_dict",
    "peft.utils.save_and_load._filter_state_dict_for_adapter_name",
}


def run(script, *arguments):
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # the order in which sets are printed
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes():
    return run(SCENES, "without"), run(SCENES, "with")


def test_pefts_own_methods_do_what_they_did(outcomes):
    without, with_us = outcomes
    for name, expected in without.items():
        # One error lists the methods that PEFT knows, which are more now.
        shown = with_us[name]
        for kind in OWN_METHODS:
            shown = shown.replace(f", <PeftType.{kind}: {kind!r}>", "")
        assert shown == expected, name


def test_the_scenes_are_what_they_say(outcomes):
    errors = {name for name, shown in outcomes[0].items() if "Error: " in shown[:40]}
    assert errors == {
        "mixed with a method that cannot be",
        "mixed with nothing",
        "padded to less",
        "padded groups that do not fit",
        "padded no adapter",
        "padded nothing",
        "lorafa of a tensor",
        "lorafa of nothing",
        "lorafa of an empty list",
        "lorafa with a bad rate",
    }


def test_nothing_else_of_peft_is_replaced():
    replaced = set(run(REPLACED))
    # What Python itself keeps beside a class or a module is not behavior.
    assert {name for name in replaced if not name.endswith(("__", "_abc_impl")) or name in ACTS_FOR_OURS_ALONE} == (
        REGISTRIES | ACTS_FOR_OURS_ALONE
    )
