"""Banks that change while they serve, cores in their own form, and heads by row."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import eigenpeft
import eigenpeft.tuners
import eigenpeft.tuners.serving.bank
from eigenpeft import AdapterBank, AdapterStore, EigenLoraConfig, PrincipalSubspace
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import AdapterMember, Core, ModuleSubspace
from tests.factories import tiny_bert
from tests.tuners.conftest import random_subspace

TOKENS = torch.arange(1, 25).view(4, 6)
WIDTHS = {"low_rank": 3, "full": 5, "diagonal": 2}


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def with_labels(n_labels):
    """The same encoder with a head of another width."""
    model, other = tiny_bert(), tiny_bert(num_labels=n_labels)
    other.bert.load_state_dict(model.bert.state_dict())
    return other


@pytest.fixture(scope="module")
def trained():
    """(a store with one classifier of each core, with heads of different widths; each one's logits on the tokens)"""
    subspace = random_subspace(tiny_bert(), ("query", "value"), n_components=6, seed=1)
    store, logits = AdapterStore(subspace), {}
    for seed, (core, n_labels) in enumerate(WIDTHS.items()):
        config = EigenLoraConfig(subspace=subspace, r=2 + seed, core=core, task_type="SEQ_CLS")
        model = randomized(get_peft_model(with_labels(n_labels), config), seed)
        store.add(model, name=core)
        with torch.no_grad():
            logits[core] = model(TOKENS).logits
    with torch.no_grad():
        logits["__base__"] = tiny_bert()(TOKENS).logits
    return store, logits


@pytest.mark.parametrize(
    "names", [["diagonal", "__base__", "full", "low_rank"], ["full"] * 4, ["__base__", *["diagonal"] * 3]]
)
def test_each_row_gets_its_own_core_and_its_own_head(trained, names):
    store, logits = trained
    model, bank = tiny_bert(), AdapterBank.from_store(store)
    with bank.attached(model), torch.no_grad():
        with bank.use(names):
            padded = model(TOKENS).logits
        with bank.use(names, logits="list"):
            rows = model(TOKENS).logits
            as_tuple = model(TOKENS, return_dict=False)[0]
        torch.testing.assert_close(model(TOKENS).logits, logits["__base__"])
    for row, name in enumerate(names):
        width = logits[name].shape[1]
        torch.testing.assert_close(padded[row, :width], logits[name][row], atol=1e-6, rtol=0)
        assert (padded[row, width:] == float("-inf")).all()
        assert torch.equal(rows[row], padded[row, :width])
        assert torch.equal(as_tuple[row], rows[row])


def test_cores_are_kept_in_their_own_form(trained):
    store, _ = trained
    sizes = {}
    for core in WIDTHS:
        bank = AdapterBank.from_store(store, names=[core])
        stacks = bank.stacks(store.subspace.modules[0])
        sizes[core] = sum(part[:1].numel() for part in stacks.parts(0))
    assert sizes == {"low_rank": 2 * 2 * 6, "full": 36, "diagonal": 6}


def test_a_head_of_several_layers_is_called_by_member():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.classifier = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x):
            return self.classifier(self.body(x))

    torch.manual_seed(0)
    base, x = Model().eval(), torch.randn(5, 4)
    subspace = random_subspace(base, ("body",), n_components=3)
    store, expected = AdapterStore(subspace), {"__base__": base(x)}
    for seed, name in enumerate("ab"):
        config = EigenLoraConfig(subspace=subspace, r=2, modules_to_save=["classifier"])
        model = randomized(get_peft_model(copy.deepcopy(base), config), seed)
        store.add(model, name=name)
        expected[name] = model(x)
    bank, names = AdapterBank.from_store(store), ["b", "a", "__base__", "b", "a"]
    with bank.attached(base), bank.use(names), torch.no_grad():
        mixed = base(x)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], atol=1e-6, rtol=0)


def test_members_come_and_go(trained):
    store, logits = trained
    model, bank = tiny_bert(), AdapterBank(store.subspace)
    with bank.attached(model), torch.no_grad():
        for core in WIDTHS:
            bank.add(store[core])
            with bank.use([core] * 4):
                torch.testing.assert_close(model(TOKENS).logits, logits[core], atol=1e-6, rtol=0)
        assert bank.names == tuple(WIDTHS)
        with bank.use(["full"] * 4):
            bank.remove("full")
            for number in range(3):  # takes no place that this batch still reads
                bank.add(store["full"], name=f"other-{number}")
            torch.testing.assert_close(model(TOKENS).logits, logits["full"], atol=1e-6, rtol=0)
        with pytest.raises(SubspaceError, match="1 of the members asked for .* 'full'"), bank.use(["full"]):
            pass
        n_bytes = bank.n_bytes
        for _ in range(600):  # places are taken again
            bank.add(store["diagonal"], name="again")
            bank.remove("again")
        assert bank.n_bytes == n_bytes
        with bank.use(["other-1", "low_rank", "diagonal", "other-2"]):
            mixed = model(TOKENS).logits
    for row, name in enumerate(["full", "low_rank", "diagonal", "full"]):
        torch.testing.assert_close(mixed[row, : WIDTHS[name]], logits[name][row], atol=1e-6, rtol=0)
    for call, message in (
        (lambda: bank.add(store["full"], name="other-1"), "'other-1' cannot be added to the bank: it is taken"),
        (lambda: bank.add(store["full"], name="__base__"), "cannot be added"),
        (lambda: bank.remove("nobody"), "'nobody'"),
    ):
        with pytest.raises(SubspaceError, match=message):
            call()


def test_a_larger_rank_finds_room(trained):
    store, _ = trained
    module = store.subspace.modules[0]
    bank = AdapterBank.from_store(store, names=["low_rank"])
    generator = torch.Generator().manual_seed(0)
    cores = {}
    for rank in (1, 5):
        parts = {"coefficients_in": torch.randn(rank, 6, generator=generator), "coefficients_out": torch.randn(6, rank)}
        cores[f"rank-{rank}"] = Core("low_rank", parts, 0.5)
        bank.add(AdapterMember({module: cores[f"rank-{rank}"]}), name=f"rank-{rank}")
    layer = tiny_bert().get_submodule(module)
    x, bases = torch.randn(2, 3, 16), store.subspace[module]
    model = tiny_bert()
    with bank.attached(model), torch.no_grad():
        own = model.get_submodule(module)
        with bank.use(["rank-5", "rank-1"]):
            mixed = own(x)
    for row, name in enumerate(["rank-5", "rank-1"]):
        update = bases.components_out.mT @ cores[name].dense() @ bases.components_in
        torch.testing.assert_close(mixed[row], layer(x[row]) + x[row] @ update.mT, atol=1e-5, rtol=1e-5)


def test_another_thread_serves_meanwhile_without_a_wrong_row(trained):
    store, _ = trained
    module = store.subspace.modules[0]
    bank, model = AdapterBank(store.subspace), tiny_bert()

    def member(value):
        return AdapterMember({module: Core("diagonal", {"coefficients_out": torch.full((6,), float(value))})})

    own, x = model.get_submodule(module), torch.randn(1, 1, 16)
    with torch.no_grad():
        before = own(x)
        bases = store.subspace[module]
        step = (x @ bases.components_in.mT) @ bases.components_out
    values = {f"{value}": value for value in range(1, 9)}
    for name, value in values.items():
        bank.add(member(value), name=name)
    stop, problems = threading.Event(), []

    def change():
        number = 0
        while not stop.is_set():
            name = str(1 + number % 8)
            bank.remove(name)
            bank.add(member(100 + number % 3), name="guest")
            bank.add(member(values[name]), name=name)
            bank.remove("guest")
            number += 1

    with bank.attached(model), torch.no_grad():
        thread = threading.Thread(target=change)
        thread.start()
        for number in range(1500):
            names = [str(1 + (number + row) % 8) for row in range(4)]
            try:
                with bank.use(names):
                    served = own(x.expand(4, 1, 16))
            except SubspaceError:
                continue  # it is away just now
            for row, name in enumerate(names):
                if not torch.allclose(served[row], before[0] + values[name] * step[0], atol=1e-4):
                    problems.append((number, name))
        stop.set()
        thread.join()
    assert not problems


def test_what_cannot_be_served_row_by_row_is_refused_by_name(trained):
    store, _ = trained
    biased = AdapterStore(store.subspace)
    model = randomized(get_peft_model(tiny_bert(), EigenLoraConfig(subspace=store.subspace, r=2, bias="all")))
    biased.add(model, name="biased")
    with pytest.raises(
        SubspaceError,
        match="'biased' trained more than updates and heads, 'base_model.model.bert.embeddings.*bias', '.*encoder.layer.0",
    ):
        AdapterBank.from_store(biased)
    with pytest.raises(SubspaceError, match="Move that store to these bases first"):
        AdapterBank(store.subspace.truncate(2)).add(store["full"])
    bank = AdapterBank.from_store(store)
    with pytest.raises(SubspaceError, match="The head 'classifier' of 'low_rank' has the parameters"):
        other = tiny_bert()
        other.classifier = nn.Sequential(nn.Linear(16, 3))
        bank.attach(other)
    with pytest.raises(SubspaceError, match='must be "padded" or "list"'), bank.use(["full"], logits="other"):
        pass


def test_a_model_without_the_head_gets_the_updates_and_a_word(trained, caplog):
    store, _ = trained
    model, bank = tiny_bert().bert, AdapterBank.from_store(store)
    with bank.attached(model), bank.use(["full"] * 4), torch.no_grad():
        features = model(TOKENS).last_hidden_state
    assert not torch.allclose(features, tiny_bert().bert(TOKENS).last_hidden_state, atol=1e-3)
    assert "Members of the bank have the head 'classifier', which BertModel lacks" in caplog.text


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = (nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(4, 3)})}) for _ in range(2))


def square(*names):
    eye, ones = torch.eye, torch.ones(2)
    return PrincipalSubspace(
        {
            name: ModuleSubspace(
                eye(2, 4),
                eye(2, 3),
                singular_values_in=ones,
                singular_values_out=ones,
                explained_variance_ratio=ones / 2,
            )
            for name in names
        }
    )


def ones():
    return torch.ones(1, 1, 2), torch.ones(1, 2, 1)


def test_two_modules_that_fit_one_are_refused_until_one_part_is_meant():
    bank, model, x = (
        AdapterBank(square("layer.q"), names=["t"], coefficients={"layer.q": ones()}),
        Towers(),
        torch.ones(1, 4),
    )
    with pytest.raises(SubspaceError, match=r"'text.layer.q', 'vision.layer.q' of the model all fit .* Pass within="):
        bank.attach(model)
    with pytest.raises(SubspaceError, match="within='audio' is not a path in Towers, which has 'text', 'vision'"):
        bank.attach(model, within="audio")
    before = {name: getattr(model, name).layer.q(x) for name in ("text", "vision")}
    with bank.attached(model, within="vision"), bank.use(["t"]):
        assert torch.equal(model.text.layer.q(x), before["text"])
        assert not torch.equal(model.vision.layer.q(x), before["vision"])


def test_a_copy_of_a_served_model_is_served_too():
    bank, model, x = (
        AdapterBank(square("0"), names=["t"], coefficients={"0": ones()}),
        nn.Sequential(nn.Linear(4, 3)),
        torch.ones(1, 4),
    )
    bank.attach(model)
    twin, other = copy.deepcopy(model), copy.deepcopy(bank)
    with bank.use(["t"]), torch.no_grad():
        assert torch.equal(twin(x), model(x))
        served = model(x)
    assert not torch.equal(model(x), served)
    assert other.names == ("t",)
    other.remove("t")
    assert bank.names == ("t",)


def test_names_of_modules_never_collide():
    subspace = square("a.b", "a/b", "items", "pop", "update", "type", "training")
    bank = AdapterBank(subspace, names=["t"], coefficients={name: ones() for name in subspace})
    assert all(bank.stacks(name).parts(0) is not None for name in subspace)
    assert len({id(bank.stacks(name)) for name in subspace}) == len(subspace)


def test_embeddings_are_served(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 4))
    side = torch.linalg.qr(torch.randn(10, 3))[0].mT, torch.linalg.qr(torch.randn(4, 3))[0].mT
    spectrum = torch.ones(3)
    info = eigenpeft.subspace.SubspaceInfo(embeddings=("0",))
    subspace = PrincipalSubspace(
        {
            "0": ModuleSubspace(
                *side, singular_values_in=spectrum, singular_values_out=spectrum, explained_variance_ratio=spectrum / 3
            )
        },
        info=info,
    )
    config = EigenLoraConfig(subspace=subspace, r=2, target_modules=["0"])
    model = randomized(get_peft_model(copy.deepcopy(base), config))
    store, x = AdapterStore(subspace), torch.randint(0, 10, (2, 5))
    store.add(model, name="e")
    bank = AdapterBank.from_store(store)
    with bank.attached(base), bank.use(["e", "__base__"]), torch.no_grad():
        mixed = base(x)
    torch.testing.assert_close(mixed[0], model(x)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[1], base(x)[1])


def test_old_names_still_work_and_name_the_new_ones():
    for place in (eigenpeft, eigenpeft.tuners, eigenpeft.tuners.serving.bank):
        with pytest.warns(DeprecationWarning, match=r"use eigenpeft\.AdapterBank"):
            assert place.TaskBank is AdapterBank
    bank = AdapterBank(square("0"), names=["t"], coefficients={"0": ones()})
    with pytest.warns(DeprecationWarning, match=r"use AdapterBank\.use"), bank.tasks(["t"]):
        pass


def test_peft_models_are_served_by_their_base_names(trained):
    store, logits = trained
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["dense"])).eval()
    bank = AdapterBank.from_store(store, names=["full"])
    with bank.attached(model), bank.use(["full"] * 4), torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits["full"], atol=1e-6, rtol=0)


def test_a_head_that_returns_no_tensor_is_refused_by_name():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Model(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.body, self.classifier = nn.Linear(4, 4), head(4, 3)

        def forward(self, x):
            return self.classifier(self.body(x))

    subspace = random_subspace(Model(nn.Linear), ("body",), n_components=3)
    config = EigenLoraConfig(subspace=subspace, r=2, modules_to_save=["classifier"])
    store, model = AdapterStore(subspace), Model(Pair)
    store.add(get_peft_model(Model(nn.Linear), config), name="a")
    bank = AdapterBank.from_store(store)
    message = "The head 'classifier' returns a tuple, and only tensors can be served"
    with bank.attached(model), bank.use(["a"]), pytest.raises(SubspaceError, match=message):
        model(torch.ones(1, 4))
