"""Second moments of inputs, from rows through a real model, against whole n x n moments by hand."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft.collection import AdapterCollection
from eigenpeft.combining import collect_statistics, load_statistics, merge, save_statistics
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.linalg.merging import core_space
from tests.factories import tiny_gpt2, tiny_llama
from tests.linalg.rules import oracle


def make_zoo(folder, model=tiny_llama, targets=("q_proj", "down_proj"), n_adapters=3):
    for i in range(n_adapters):
        config = LoraConfig(r=2 + i, lora_alpha=7, target_modules=list(targets), fan_in_fan_out=model is tiny_gpt2)
        adapted = get_peft_model(model(), config)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=generator)
        adapted.save_pretrained(folder / f"task{i}", save_embedding_layers=False)
    return folder


def batches(seed, n_batches=2):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n_batches):
        ids = torch.randint(3, 64, (4, 9), generator=generator)
        mask = (torch.arange(9) < torch.randint(4, 10, (4, 1), generator=generator)).long()
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


ROWS = {f"task{i}": batches(i) for i in range(3)}


def moments_by_hand(folder, task, rows, model=tiny_llama):
    """E[x xᵀ] (n, n) of every adapted module, by PEFT's own forward pass of the adapter."""
    adapted = PeftModel.from_pretrained(model(), folder / task).eval()
    seen, hooks, mask = {}, [], {}

    def record(name):
        def hook(module, inputs):
            seen.setdefault(name, []).append(inputs[0][mask["now"].bool()].double())

        return hook

    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            hooks.append(module.register_forward_pre_hook(record(name.removeprefix("base_model.model."))))
    with torch.no_grad():
        for batch in rows:
            mask["now"] = batch["attention_mask"]
            adapted(**batch)
    joined = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: rows.mT @ rows / len(rows) for name, rows in joined.items()}


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_regmean_of_a_model_is_that_of_whole_moments(model, tmp_path):
    targets = ("q_proj", "down_proj") if model is tiny_llama else ("c_attn", "c_fc")
    folder = make_zoo(tmp_path / "zoo", model, targets)
    statistics = collect_statistics(model(), batches=ROWS, adapters=folder, progress=False)
    merged = merge(folder, rule="regmean", statistics=statistics, shrink=1.0, progress=False)
    singles = {task: merge(folder / task, progress=False) for task in ROWS}
    by_hand = {task: moments_by_hand(folder, task, rows, model) for task, rows in ROWS.items()}
    for module, (lora_B, lora_A) in merged.factors.items():
        updates = [
            (one.factors[module][0].double() @ one.factors[module][1].double()).numpy() for one in singles.values()
        ]
        in_side = oracle.axes(updates)[1]
        # Whole moments restricted to the row spaces, outside of which no update acts.
        keep = in_side.T @ in_side
        moments = [keep @ own[module].numpy() @ keep for own in by_hand.values()]
        expected = torch.from_numpy(oracle.regmean(updates, moments))
        found = lora_B.double() @ lora_A.double()
        assert (found - expected).norm() / expected.norm() < 1e-4


def test_a_merged_adapter_at_work_gives_the_inputs_of_its_own_layers(tmp_path):
    folder = make_zoo(tmp_path / "zoo")
    merged = merge(folder, scale=0.7, progress=False)
    merged.save_pretrained(tmp_path / "merged")
    statistics = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, merged=merged, progress=False)
    own = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, progress=False)
    collection = AdapterCollection.from_pretrained(str(folder))
    for task, rows in ROWS.items():
        by_hand = moments_by_hand(tmp_path, "merged", rows)
        for module, expected in by_hand.items():
            updates = {read.adapter: (read.lora_B, read.lora_A) for read in collection.factors(module)}
            axes = core_space(list(updates.values())).components_in
            found = statistics[task].on_axes(module, updates=updates, components_in=axes)
            torch.testing.assert_close(found, axes @ expected @ axes.mT, atol=1e-5, rtol=1e-4)
        last = collection.modules[-1]
        assert not torch.allclose(statistics[task].grams[last], own[task].grams[last], rtol=1e-2)


def test_statistics_add_up_over_rows(tmp_path):
    folder, model = make_zoo(tmp_path / "zoo"), tiny_llama()
    whole = collect_statistics(model, batches=ROWS, adapters=folder, progress=False)
    parts = [
        collect_statistics(
            model, batches={name: rows[i] for name, rows in ROWS.items()}, adapters=folder, progress=False
        )
        for i in range(2)
    ]
    for name, one in whole.items():
        total = parts[0][name] + parts[1][name]
        assert total.counts == one.counts
        for module, gram in one.grams.items():
            torch.testing.assert_close(total.grams[module], gram, atol=1e-9, rtol=1e-9)


def test_statistics_serve_any_of_the_adapters_they_were_collected_for(tmp_path):
    folder = make_zoo(tmp_path / "zoo")
    statistics = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, progress=False)
    fewer = collect_statistics(
        tiny_llama(),
        batches={name: ROWS[name] for name in ("task0", "task2")},
        adapters=folder,
        names=["task2", "task0"],
        progress=False,
    )
    names = ["task0", "task2"]
    one, other = (
        merge(folder, rule="regmean", statistics=each, names=names, progress=False) for each in (statistics, fewer)
    )
    for module, (lora_B, lora_A) in one.factors.items():
        expected = other.factors[module][0] @ other.factors[module][1]
        torch.testing.assert_close(lora_B @ lora_A, expected, atol=1e-5, rtol=1e-4)


def test_statistics_come_back_from_disk(tmp_path):
    folder = make_zoo(tmp_path / "zoo")
    statistics = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, progress=False)
    save_statistics(statistics, tmp_path / "statistics")
    loaded = load_statistics(tmp_path / "statistics")
    assert list(loaded) == list(statistics)
    with pytest.raises(ArtifactError, match="statistics"):
        save_statistics({}, tmp_path / "statistics")
    assert list(load_statistics(tmp_path / "statistics")) == list(statistics)
    for name, one in statistics.items():
        assert (loaded[name].counts, loaded[name].layout, loaded[name].sha256) == (one.counts, one.layout, one.sha256)
        assert all(torch.equal(loaded[name].grams[module], gram) for module, gram in one.grams.items())
    # R x R numbers for each module and task, not n x n.
    assert all(gram.shape == (9, 9) for gram in statistics["task0"].grams.values())


def test_embedding_inputs_are_tokens(tmp_path):
    folder = make_zoo(tmp_path / "zoo", targets=("embed_tokens",), n_adapters=2)
    rows = {name: ROWS[name] for name in ("task0", "task1")}
    statistics = collect_statistics(tiny_llama(), batches=rows, adapters=folder, progress=False)
    [(module, count)] = statistics["task0"].counts.items()
    assert count == sum(int(batch["attention_mask"].sum()) for batch in rows["task0"])
    # The second moment of one-hot inputs is diagonal: the tokens' frequencies.
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in rows["task0"]])
    frequencies = torch.bincount(tokens, minlength=64).double() / len(tokens)
    singles = {task: merge(folder / task, progress=False).factors[module] for task in rows}
    space = core_space(list(singles.values()))
    found = statistics["task0"].on_axes(module, updates=singles, components_in=space.components_in)
    expected = space.components_in @ torch.diag(frequencies) @ space.components_in.mT
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path):
    folder, model = make_zoo(tmp_path / "zoo"), tiny_llama().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    collect_statistics(model, batches=ROWS, adapters=folder, progress=False)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bad_statistics_are_named(tmp_path):
    folder = make_zoo(tmp_path / "zoo")
    with pytest.raises(
        AdapterConfigError, match=r"batches are of \['task0'\], the adapters are \['task0', 'task1', 'task2'\]"
    ):
        collect_statistics(tiny_llama(), batches={"task0": ROWS["task0"]}, adapters=folder, progress=False)
    adapted = PeftModel.from_pretrained(tiny_llama(), folder / "task0")
    with pytest.raises(AdapterConfigError, match="pass the base model without adapters"):
        collect_statistics(adapted, batches=ROWS, adapters=folder, progress=False)
    with pytest.raises(AdapterConfigError, match="'model.layers.0.mlp.down_proj' is 0 times in the model"):
        collect_statistics(tiny_gpt2(), batches=ROWS, adapters=folder, progress=False)
    with pytest.raises(ArtifactError, match="No statistics can be read from"):
        load_statistics(tmp_path / "zoo")
    statistics = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, progress=False)
    with pytest.raises(AdapterConfigError, match="'task0' and 'task1' were not collected for one task"):
        statistics["task0"] + statistics["task1"]
    make_zoo(tmp_path / "other", n_adapters=1)
    (tmp_path / "other" / "task0").rename(tmp_path / "zoo" / "new")
    with pytest.raises(AdapterConfigError, match=r"'new' \(1 of 4\) have none"):
        merge(folder, rule="regmean", statistics=statistics, progress=False)


def test_statistics_of_other_weights_are_refused(tmp_path):
    folder = make_zoo(tmp_path / "zoo")
    statistics = collect_statistics(tiny_llama(), batches=ROWS, adapters=folder, progress=False)
    make_zoo(tmp_path / "again", targets=("q_proj",))
    (tmp_path / "again" / "task1" / "adapter_model.safetensors").replace(folder / "task1" / "adapter_model.safetensors")
    with pytest.raises(AdapterConfigError, match="were collected when 'task1' had other weights"):
        merge(folder, rule="regmean", statistics=statistics, progress=False)
