"""LoRe end to end on SmolLM2-135M: two simulated kinds of user, told apart from text, by frozen features and by LoReTrainer.

Paper:    LoRe, arXiv 2504.14439; data: Anthropic's HH pairs relabelled for "helpful" and "harmless" (VPL, arXiv 2408.10075).
Command:  python benchmarks/lore_smollm2.py --model MODEL --data DIR --work WORK --subspace SUBSPACE
          (MODEL and DIR: see benchmarks/smollm2_data.py; SUBSPACE: made of the zoo of benchmarks/smollm2.py)
          python benchmarks/lore_policies.py   (the policies that follow, and the figure)
Hardware: 1 CPU core with bf16 instructions; 5 minutes for the features, then about 6 per row.
          Started again, it goes on where it stopped.
Writes:   benchmarks/results/lore_smollm2.json

All 1,600 comparisons, each labelled by one of the users; the last turn and the beginning of the answer (58 tokens on average).
Two halves: fitted to one and asked about the other, then the other way round, so that every comparison is held out once.

frozen    `LoReFitter` on the last hidden state of the untouched model: one row for both users (B = 1), and two. "surface": the same
          on four numbers of the answer's text, such as its length.
reward    `LoReTrainer` from there on, one pass over the half: LoRA with two rows, in the recycled subspace with two, LoRA with one.
          B = 1 is one reward for both users: what two rows gain over it is what personalisation is worth here.

A row keeps which held-out comparisons were ordered rightly, so that methods are compared comparison by comparison. Learning
rates are a quarter of those that benchmarks/smollm2.py chose for SFT, as the start is warm; none was chosen by a held-out half.
"""

import argparse
import random
import time
from itertools import product
from pathlib import Path
from statistics import fmean

import smollm2_data
import torch
from datasets import Dataset
from peft import LoraConfig
from timing import environment
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from eigenpeft import EigenLoraConfig, LowRankRewardModel, PrincipalSubspace
from eigenpeft.reward import LoReFitter, embed_preferences
from eigenpeft.reward.text.rewards import classify
from eigenpeft.trainers import LoReConfig, LoReTrainer

RESULTS = Path(__file__).parent / "results" / "lore_smollm2.json"
USERS = ("helpful", "harmless")
HALVES, BATCH = (0, 1), 8
# Prior scales of the frozen fit, fixed: two users are too few to hold any out.
FROZEN = {"shared_scale": 1.0, "deviation_scale": 1.0, "concentration": 0.5, "strength": 1.0}
# method, rows of the basis, learning rate
REWARDS = (("LoRA r16", 2, 5e-4), ("LoRA r16", 1, 5e-4), ("EigenLoRA", 2, 2.5e-3))
# Queries and values of the upper ten of thirty layers: no gradient has to pass the others.
ADAPTED = r".*layers\.2\d\.self_attn\.[qv]_proj"
COMMON = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Halves:
    """The comparisons, their features, and what is held out of each half."""

    def __init__(self, arguments):
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        # Padding with the end token would hide it, and the reward would be read one token early.
        self.tokenizer.pad_token = "<|endoftext|>"
        self.model = AutoModelForSequenceClassification.from_pretrained(
            arguments.model, num_labels=1, dtype=torch.bfloat16
        )
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        torch.nn.init.zeros_(self.model.score.weight)  # drawn anew at each start, and not used
        self.rows = smollm2_data.cut_pairs(arguments.data, self.tokenizer.eos_token)
        self.work = arguments.work

    def features(self):
        return embed_preferences(
            Dataset.from_list(self.rows),
            model=self.model,
            processing_class=self.tokenizer,
            cache_dir=self.work / "features",
            batch_size=16,
        )

    def split(self, half):
        """Numbers of the comparisons to fit to, and of those to ask about; each user's are halved."""
        own = {user: [i for i, row in enumerate(self.rows) if row["user_id"] == user] for user in USERS}
        asked = sorted(i for rows in own.values() for i in rows[half::2])
        return [i for i in range(len(self.rows)) if i not in set(asked)], asked

    def score(self, model, by_basis, asked):
        """Held-out comparisons by margins under every row: which are right for the own user, which for the population."""
        users = [self.rows[i]["user_id"] for i in asked]
        others = [USERS[1 - USERS.index(user)] for user in users]
        own, other = ((by_basis * model.user_weights(names)).sum(dim=1) > 0 for names in (users, others))
        population = by_basis @ model.population_weights > 0
        found = {"own": own, "population": population, "other": other}
        of_user = {user: torch.tensor([name == user for name in users]) for user in USERS}
        heads = torch.stack([model.reward_head(user) for user in USERS])
        return {
            "accuracy": {
                name: {"all": share(right)} | {user: share(right[mask]) for user, mask in of_user.items()}
                for name, right in found.items()
            },
            "weights": {user: [round(w, 4) for w in model.user_weights([user])[0].tolist()] for user in USERS},
            "cosine_of_heads": round(torch.cosine_similarity(*heads, dim=0).item(), 4),
            "right": {name: "".join("01"[int(one)] for one in found[name]) for name in ("own", "population")},
        }


def share(right):
    return round(right.float().mean().item(), 4)


def surface(halves):
    """Four numbers of each answer that any model sees: what can be told without understanding."""

    def numbers(text):
        answer = text.removesuffix(halves.tokenizer.eos_token)
        return [len(answer) / 100, len(answer) ** 0.5 / 10, float("?" in answer), float("sorry" in answer.lower())]

    return (torch.tensor([numbers(row[side]) for row in halves.rows]) for side in ("chosen", "rejected"))


def hidden(halves):
    features = halves.features()
    return (torch.from_numpy(features[side][:]) for side in ("chosen", "rejected"))


def fit_frozen(halves, method, n_basis, half):
    """A row of results; the model on hidden states goes to WORK/lore."""
    chosen, rejected = surface(halves) if method == "surface" else hidden(halves)
    fitted, asked = halves.split(half)
    start = time.process_time()
    fitter = LoReFitter(n_basis=n_basis, **FROZEN).fit(
        chosen[fitted],
        rejected[fitted],
        user_ids=[halves.rows[i]["user_id"] for i in fitted],
        backbone=None if method == "surface" else halves.model,
        processing_class=halves.tokenizer,
    )
    seconds = round(time.process_time() - start, 2)
    if method == "frozen":
        fitter.model_.save_pretrained(halves.work / "lore" / f"frozen {n_basis} {half}")
    scored = halves.score(fitter.model_, fitter.model_.basis_rewards(chosen[asked] - rejected[asked]), asked)
    return scored | {"parameters": n_basis * (chosen.shape[1] + len(USERS)), "cpu_seconds": seconds}


def by_length(rows, *, seed):
    """Batches of comparisons of like length, in random order: half the padding of a random order."""
    draw = random.Random(seed)
    ordered = sorted(rows, key=lambda row: max(len(row["chosen"]), len(row["rejected"])) + len(row["prompt"]))
    batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    return [row for batch in draw.sample(batches, len(batches)) for row in batch]


def adapter(method, subspace):
    common = {"r": 16, "lora_alpha": 32, "target_modules": ADAPTED, "task_type": "SEQ_CLS"}
    if method == "EigenLoRA":
        return EigenLoraConfig(subspace=PrincipalSubspace.from_pretrained(subspace), **common)
    return LoraConfig(**common)


def train_reward(halves, method, n_basis, rate, half, *, seed, subspace):
    """A row of results; the model goes to WORK/lore."""
    fitted, asked = halves.split(half)
    start = time.process_time()
    set_seed(seed)
    trainer = LoReTrainer(
        LowRankRewardModel.from_pretrained(halves.work / "lore" / f"frozen {n_basis} {half}"),
        LoReConfig(
            str(halves.work / "runs" / "lore"),
            n_basis=n_basis,
            learning_rate=rate,
            num_train_epochs=1,
            warmup_steps=10,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            seed=seed,
            **COMMON,
        ),
        train_dataset=Dataset.from_list(by_length([halves.rows[i] for i in fitted], seed=seed)),
        processing_class=halves.tokenizer,
        peft_config=adapter(method, subspace),
    )
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    model = trainer.reward_model()
    model.save_pretrained(halves.work / "lore" / f"{method} {n_basis} {half}")
    chosen, rejected = (
        classify(model.backbone, halves.tokenizer, [row["prompt"] + row[side] for row in rows], batch_size=16)
        for rows in [[halves.rows[i] for i in asked]]
        for side in ("chosen", "rejected")
    )
    return halves.score(model, chosen - rejected, asked) | {
        "parameters": parameters,
        "curves": {
            key: [[log["step"], round(log[key], 3)] for log in trainer.state.log_history if key in log]
            for key in ("loss", "accuracy")
        },
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def compare(record, *, n_draws=10_000):
    """Accuracies and gains over the controls, on the halves that both sides have; bootstraps over comparisons."""

    def right(method, n_basis, whose="own"):
        rows = {half: record.find(method=method, n_basis=n_basis, half=half) for half in HALVES}
        return {half: [int(one) for one in row["right"][whose]] for half, row in rows.items() if row}

    found = {}
    for method, n_basis in [*product(("surface", "frozen"), (1, 2)), *(cell[:2] for cell in REWARDS)]:
        own = right(method, n_basis)
        if own:
            cell = {"accuracy": interval(sum(own.values(), []), n_draws)}
            controls = {
                "population of its own": right(method, n_basis, "population"),
                "one row": right(method if method in ("surface", "frozen") else "LoRA r16", 1),
                "frozen, as many rows": right("frozen", n_basis),
            }
            for name, other in controls.items():
                pairs = [pair for half in own if half in other for pair in zip(own[half], other[half], strict=True)]
                if pairs:
                    cell[f"gain over {name}"] = interval([a - b for a, b in pairs], n_draws)
            found[f"{method}, B = {n_basis}"] = cell
    return found


def interval(values, n_draws):
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(n_draws))
    low, high = means[n_draws // 40], means[-n_draws // 40]
    return {"mean": round(fmean(values), 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--subspace", type=Path, help="without it the EigenLoRA rows are left out")
    parser.add_argument("--halves", nargs="*", type=int, default=HALVES, choices=HALVES, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    smollm2_data.quiet()
    record, halves = smollm2_data.Record(arguments.results, environment()), Halves(arguments)
    for method, n_basis, half in product(("surface", "frozen"), (1, 2), HALVES):
        cell = {"stage": "frozen", "method": method, "n_basis": n_basis, "half": half}
        if not record.find(**cell):
            record.add(cell | fit_frozen(halves, method, n_basis, half))
    for half in arguments.halves:
        for method, n_basis, rate in REWARDS:
            cell = {"stage": "reward", "method": method, "n_basis": n_basis, "half": half, "learning_rate": rate}
            cell |= {"seed": arguments.seed}
            if not record.find(**cell) and (method != "EigenLoRA" or arguments.subspace):
                options = {"seed": arguments.seed, "subspace": arguments.subspace}
                record.add(cell | train_reward(halves, method, n_basis, rate, half, **options))
                row = record.rows[-1]
                print(method, n_basis, half, row["accuracy"], row["weights"], row["cpu_seconds"], "s", flush=True)
    for name, cell in compare(record, n_draws=2000).items():
        print(name, cell)


if __name__ == "__main__":
    main()
