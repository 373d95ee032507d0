"""Does recycling pay on a causal LM? Left-out T0 tasks and gsm8k on SmolLM2-135M, every method beside its controls.

Paper:     EigenLoRAx, arXiv 2502.04700.
Command:   python benchmarks/study/causal.py tune test --model MODEL --data DIR --work WORK
           (MODEL and DIR: see benchmarks/smollm2_data.py; WORK keeps the zoo, trained when a cell needs it), then
           causal_report.py.
Hardware:  1 CPU core with bfloat16 instructions; 10 to 30 s per cell, about an hour in all.
Writes:    benchmarks/results/study/causal.jsonl, one line per cell. Started again, it goes on where it stopped.

The zoo: one LoRA (r 8; q_proj and v_proj of the upper half of the layers; a seed of its own) for each of twelve T0 tasks with
short texts. The target's own adapter is left out of the subspace; gsm8k has none. Learning rates, four a method, were chosen on
two tasks that are never targets. Same rows, order, steps and batch for all methods; seeds draw the order, the adapter and the
random subspace. Loss: mean over the answer's tokens of 40 held-out rows.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import torch
from causal_tasks import Batch, Halves, Task, batches, load_task, pack
from encoder import append, quiet, read
from peft import LoraConfig, get_peft_model
from timing import environment
from torch import nn
from transformers import get_linear_schedule_with_warmup, set_seed

from eigenpeft import EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.audit import audit_adapters
from eigenpeft.collection import AdapterCollection
from eigenpeft.subspace import mean_only_subspace, random_subspace
from eigenpeft.tuners import same_parameters_lora

RESULTS = Path(__file__).parents[1] / "results" / "study" / "causal.jsonl"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TUNING_TASKS = ("sciq", "kilt_tasks_hotpotqa")
TARGETS = ("common_gen", "glue_qqp", "gigaword", "gsm8k")
ZOO = (
    *("common_gen", "glue_qqp", "gigaword", "social_i_qa", "sciq", "kilt_tasks_hotpotqa"),
    *("wiki_qa", "commonsense_qa", "quartz", "quarel", "glue_mrpc", "paws"),
)
PROJECTIONS = ["q_proj", "v_proj"]
RANK, ALPHA = 8, 16
STEPS, BATCH_SIZE, JUDGED_EVERY = 24, 4, 6
ZOO_STEPS, ZOO_BATCH_SIZE, ZOO_RATE, ZOO_SEED = 32, 8, 2e-3, 10
N_TRAIN, TUNING_SEED, SEEDS = 160, 100, (0, 1)
# Four a method: the fewer parameters, the higher. Widened upwards when the best of three was the highest for most.
LOW_RATES, MIDDLE_RATES, HIGH_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1), (1e-2, 3e-2, 1e-1, 3e-1)

# From the zoo without the target, and the seed, to what PEFT needs.
Configure = Callable[[AdapterCollection, int], LoraConfig | EigenLoraConfig]


@lru_cache(maxsize=8)
def recycled(sources: AdapterCollection, n_components: int) -> PrincipalSubspace:
    return SubspaceBuilder(n_components).fit(sources).subspace_


def eigenlora(subspace: PrincipalSubspace) -> EigenLoraConfig:
    return EigenLoraConfig(subspace=subspace, r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM")


def plain_lora(sources: AdapterCollection, seed: int) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, task_type="CAUSAL_LM")


def small_lora(sources: AdapterCollection, seed: int, *, n_components: int) -> LoraConfig:
    config = same_parameters_lora(recycled(sources, n_components), r=RANK, place="spread")
    config.task_type = "CAUSAL_LM"
    return config


@dataclass(frozen=True)
class Method:
    """One way to adapt: its config, the learning rates tried for it, or the method whose rate it takes."""

    configure: Configure
    rates: tuple[float, ...]
    tuned_as: str | None = None


OURS = "EigenLoRA K=32"
METHODS = {
    OURS: Method(lambda sources, seed: eigenlora(recycled(sources, 32)), MIDDLE_RATES),
    "random subspace K=32": Method(
        lambda sources, seed: eigenlora(random_subspace(like=recycled(sources, 32), seed=seed)), MIDDLE_RATES
    ),
    "LoRA, equal parameters to K=32": Method(partial(small_lora, n_components=32), MIDDLE_RATES),
    "EigenLoRA K=8": Method(lambda sources, seed: eigenlora(recycled(sources, 8)), HIGH_RATES),
    "random subspace K=8": Method(
        lambda sources, seed: eigenlora(random_subspace(like=recycled(sources, 8), seed=seed)), HIGH_RATES
    ),
    "LoRA, equal parameters to K=8": Method(partial(small_lora, n_components=8), MIDDLE_RATES),
    "LoRA r8": Method(plain_lora, LOW_RATES),
    "mean-only subspace": Method(
        lambda sources, seed: eigenlora(mean_only_subspace(sources, n_components=32, progress=False)), (), OURS
    ),
}


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (n_answer_tokens, vocabulary) at the places before the answers' tokens."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=core.lm_head.weight.dtype == torch.bfloat16):
        outputs = core.model(inputs_embeds=batch.hidden, position_ids=batch.positions, use_cache=False)
        return core.lm_head(outputs.last_hidden_state[0, batch.before_answer]).float()


@torch.no_grad()
def judge(model: nn.Module, task: Task) -> tuple[float, float]:
    """Mean loss over the answers' tokens of the held-out rows, and the share of rows whose answer is greedily right."""
    model.eval()
    losses, right = [], 0
    for start in range(0, len(task.test), 10):
        batch = pack(task.test[start : start + 10])
        logits = answer_logits(model, batch)
        losses.append(nn.functional.cross_entropy(logits, batch.answer, reduction="none"))
        wrong = batch.row[logits.argmax(1) != batch.answer].unique()
        right += int(batch.row[-1]) + 1 - len(wrong)
    model.train()
    return round(float(torch.cat(losses).mean()), 4), round(right / len(task.test), 4)


def train(
    model: nn.Module, task: Task, *, rate: float, seed: int, steps: int, batch_size: int, judged_every: int
) -> dict:
    """Curves of the held-out and the training loss, and CPU seconds without judging."""
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    drawn = batches(task.train, batch_size=batch_size, seed=seed)
    curve, training, seconds = [], [], 0.0
    model.train()
    for step in range(1, steps + 1):
        start = time.process_time()
        batch = next(drawn)
        loss = nn.functional.cross_entropy(answer_logits(model, batch), batch.answer)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        training.append(round(loss.item(), 4))
        seconds += time.process_time() - start
        if step % judged_every == 0 or step == steps:
            curve.append([step, *judge(model, task)])
    return {
        "parameters": sum(p.numel() for p in adapter),
        "loss": curve[-1][1],
        "exact": curve[-1][2],
        "curve": curve,
        "training_loss": training,
        "cpu_seconds": round(seconds, 1),
    }


def best_rate(rows: list[dict], name: str) -> float:
    """The learning rate of the lowest mean held-out loss on the tuning tasks."""
    name = METHODS[name].tuned_as or name
    found = defaultdict(list)
    for row in rows:
        if row["stage"] == "tune" and row["method"] == name:
            found[row["rate"]].append(row["loss"])
    complete = {rate: fmean(losses) for rate, losses in found.items() if len(losses) == len(TUNING_TASKS)}
    if len(complete) < len(METHODS[name].rates):
        raise SystemExit(f"{name} is not tuned yet: run the stage `tune` first.")
    return min(complete, key=complete.__getitem__)


def cells(stage: str, results: Path, *, seeds: list[int], methods: list[str], rate: float | None) -> Iterator[dict]:
    """What the stage trains, in order; learning rates are looked up when a cell's turn has come."""
    if stage == "tune":
        for target in TUNING_TASKS:
            for name in methods:
                for rate in METHODS[name].rates:
                    yield {"target": target, "method": name, "rate": rate, "seed": TUNING_SEED}
        return
    for target in TARGETS:
        yield {"target": target, "method": "base"}
    for seed in seeds:
        for target in TARGETS:
            for name in methods:
                yield {"target": target, "method": name, "rate": rate or best_rate(read(results), name), "seed": seed}


def trained_zoo(halves: Halves, load: Callable[[str], Task], work: Path, results: Path) -> AdapterCollection:
    """The zoo, each adapter trained unless WORK has it, and audited."""
    for number, name in enumerate(ZOO):
        cell = {"stage": "zoo", "target": name, "seed": ZOO_SEED + number, "rate": ZOO_RATE}
        if (work / "zoo" / name).exists():
            continue
        task = load(name)
        set_seed(cell["seed"])
        model = get_peft_model(halves.upper(), plain_lora(None, 0))
        before, _ = judge(model, task)
        result = train(
            model,
            task,
            rate=ZOO_RATE,
            seed=cell["seed"],
            steps=ZOO_STEPS,
            batch_size=ZOO_BATCH_SIZE,
            judged_every=ZOO_STEPS,
        )
        model.peft_config["default"].base_model_name_or_path = BASE_NAME  # what readers can find
        model.save_pretrained(work / "zoo" / name)
        sizes = {"steps": ZOO_STEPS, "batch_size": ZOO_BATCH_SIZE, "loss_before": before}
        if not any(cell.items() <= row.items() for row in read(results)):
            append(results, {**cell, **sizes, **result, "environment": environment()})
        print(f"zoo {name}: {before} -> {result['loss']}, {result['cpu_seconds']} s", flush=True)
    zoo = AdapterCollection.from_pretrained(work / "zoo")
    audit_zoo(zoo, results)
    return zoo


def audit_zoo(zoo: AdapterCollection, results: Path) -> None:
    """What `eigenpeft audit` says of the zoo, in a row."""
    if any(row["stage"] == "audit" for row in read(results)):
        return
    report = audit_adapters(zoo, n_components=64, progress=False)
    places = (8, 32, 64)
    shares = {
        f"{kind}_{source}": {str(k): round(getattr(getattr(report, kind), source)[k - 1], 4) for k in places}
        for kind in ("explained", "held_out")
        for source in ("real", "null")
    }
    append(results, {"stage": "audit", "verdict": report.verdict, **shares, "environment": environment()})


def run(cell: dict, *, task: Task, zoo: AdapterCollection, halves: Halves) -> dict:
    """Train and judge one cell."""
    if cell["method"] == "base":
        loss, exact = judge(halves.upper(), task)
        return {"loss": loss, "exact": exact, "rows": len(task.test)}
    sources = without(zoo, task.name)
    set_seed(cell["seed"])
    model = get_peft_model(halves.upper(), METHODS[cell["method"]].configure(sources, cell["seed"]))
    judged_every = JUDGED_EVERY if cell["stage"] == "test" else cell["steps"]
    sizes = {"steps": cell["steps"], "batch_size": cell["batch_size"]}
    return train(model, task, rate=cell["rate"], seed=cell["seed"], judged_every=judged_every, **sizes)


@lru_cache(maxsize=2)
def without(zoo: AdapterCollection, name: str) -> AdapterCollection:
    return zoo.without(name) if name in zoo else zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=["tune", "test"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rate", type=float, help="of the stage test, instead of the one chosen by the stage tune")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    halves = Halves(arguments.model)
    load = lru_cache(maxsize=8)(partial(load_task, data=arguments.data, halves=halves, n_train=N_TRAIN))
    zoo = None
    for stage in arguments.stages:
        planned = {"seeds": arguments.seeds, "methods": arguments.methods, "rate": arguments.rate}
        for cell in cells(stage, arguments.results, **planned):
            cell |= {"stage": stage, "steps": STEPS, "batch_size": BATCH_SIZE}
            if any(cell.items() <= row.items() for row in read(arguments.results)):
                continue
            zoo = zoo or trained_zoo(halves, load, arguments.work, arguments.results)
            result = run(cell, task=load(cell["target"]), zoo=zoo, halves=halves)
            append(arguments.results, {**cell, **result, "environment": environment()})
            shown = [cell.get("seed"), cell.get("rate"), result["loss"], result["exact"], result.get("cpu_seconds")]
            print(stage, f"{cell['target']:20} {cell['method']:32}", *shown, flush=True)


if __name__ == "__main__":
    main()
