"""Two policies of SmolLM2-135M, each trained by GRPO for one user of the LoRe reward model, on the same prompts.

Paper:    LoRe, arXiv 2504.14439; GRPO, arXiv 2402.03300.
Command:  python benchmarks/lore_policies.py --model MODEL --data DIR --work WORK
          (after benchmarks/lore_smollm2.py, in the same WORK: the reward model is its LoRA with two rows, half 0)
Hardware: 1 CPU core with bf16 instructions; 17 CPU minutes a policy. Started again, it goes on where it stopped.
Writes:   benchmarks/results/lore_policies.json and lore_smollm2.png

`GRPOTrainer` with `reward_func(user_column=...)`: the rewards of both users are logged, only the own one is trained on. Prompts to
train on are of the comparisons that the reward model was fitted to. Then three policies, the untrained one among them, answer
held-out prompts with the same random numbers. Changes are taken prompt by prompt, ± one standard error.

A shared direction of both users' rewards raises both; what separates the policies is the difference of the two rewards. With
`--contrast` a policy is trained on own minus other reward instead, which has nothing shared in it.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean, stdev

import smollm2_data
import torch
from datasets import Dataset
from lore_smollm2 import COMMON, USERS, Halves
from peft import LoraConfig
from timing import environment
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from eigenpeft import LowRankRewardModel
from eigenpeft.report.plots import new_figure, save_figure

RESULTS = Path(__file__).parent / "results" / "lore_policies.json"
REWARDS = "LoRA r16 2 0"
STEPS, RATE, N_TOKENS, N_ASKED = 72, 1e-3, 24, 288


def reward_model(work):
    model = LowRankRewardModel.from_pretrained(work / "lore" / REWARDS)
    model.backbone.to(torch.bfloat16)
    return model


def prompts(halves, *, held_out, n=None):
    """Short prompts of half 0, or of the other half."""
    rows = [halves.rows[i]["prompt"] for i in halves.split(0)[int(held_out)]]
    return [prompt for prompt in rows if len(prompt) <= 120][:n]


def train_policy(user, *, contrast, seed, arguments, halves):
    """A row of results with its curves."""
    rewards, other = reward_model(arguments.work), USERS[1 - USERS.index(user)]
    asked = [{"prompt": prompt, "own": user, "other": other} for prompt in prompts(halves, held_out=False)]
    start = time.process_time()
    set_seed(seed)
    trainer = GRPOTrainer(
        str(arguments.model),
        reward_funcs=[
            rewards.reward_func(user_column=column, batch_size=16, end_token=True) for column in ("own", "other")
        ],
        args=GRPOConfig(
            str(arguments.work / "runs" / "policy"),
            reward_weights=[1.0, -1.0 if contrast else 0.0],
            learning_rate=RATE,
            beta=0.0,
            max_steps=STEPS,
            warmup_steps=3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=N_TOKENS,
            seed=seed,
            model_init_kwargs={"dtype": "bfloat16"},
            **COMMON,
        ),
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    names = {column: f"rewards/lore_{column}/mean" for column in ("own", "other")}
    names |= {"length": "completions/mean_length"}
    curves = {
        name: [[log["step"], round(log[key], 4)] for log in trainer.state.log_history if key in log]
        for name, key in names.items()
    }
    judged = judge(trainer.model, rewards, halves, arguments)
    return {"curves": curves, **judged, "cpu_seconds": round(time.process_time() - start, 1)}


@torch.no_grad()
def judge(model, rewards, halves, arguments):
    """Reward to each user of sampled answers to held-out prompts, the same random numbers for every policy."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    asked = sorted(prompts(halves, held_out=True, n=N_ASKED), key=len)
    set_seed(1)
    answers = []
    for start in range(0, len(asked), 16):
        batch = tokenizer(asked[start : start + 16], return_tensors="pt", padding=True)
        tokens = model.eval().generate(**batch, max_new_tokens=N_TOKENS, do_sample=True, temperature=1.0, top_k=0)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    reward = rewards.reward_func(batch_size=16, end_token=True)
    values = {user: reward(prompts=asked, completions=answers, user_id=[user] * len(asked)) for user in USERS}
    return {
        "mean": {user: with_error(found) for user, found in values.items()},
        "rewards": {user: [round(value, 3) for value in found] for user, found in values.items()},
        "mean_characters": round(fmean(map(len, answers)), 1),
    }


def with_error(values):
    return {"mean": round(fmean(values), 4), "sem": round(stdev(values) / len(values) ** 0.5, 4)}


def changes(row, base):
    """Reward after minus before, prompt by prompt, to each user, and of the difference own minus other."""
    of_user = {
        user: [a - b for a, b in zip(row["rewards"][user], base["rewards"][user], strict=True)] for user in USERS
    }
    own, other = (of_user[user] for user in (USERS if row["user"] == USERS[0] else USERS[::-1]))
    apart = [a - b for a, b in zip(own, other, strict=True)]
    return {user: with_error(found) for user, found in of_user.items()} | {"own minus other": with_error(apart)}


def between(rows):
    """How far the two policies come apart: the first's reward minus the second's, to each user, and their difference."""
    first, second = (row["rewards"] for row in rows)
    of_user = {user: [a - b for a, b in zip(first[user], second[user], strict=True)] for user in USERS}
    apart = [a - b for a, b in zip(*of_user.values(), strict=True)]
    return {user: with_error(found) for user, found in of_user.items()} | {"first minus second user": with_error(apart)}


def figure(rows, path):
    """Rewards of both users along both trainings."""
    made, axes = new_figure(1, 2, width=9, height=3.6)
    for axis, row in zip(axes, rows, strict=True):
        user = row["user"]
        for name, color in (("own", "tab:blue"), ("other", "tab:orange")):
            steps, values = zip(*row["curves"][name], strict=True)
            means = [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            whose = user if name == "own" else USERS[1 - USERS.index(user)]
            label = f"reward to {whose}" + (" (trained on)" if name == "own" else "")
            axis.plot(steps, values, color=color, alpha=0.25)
            axis.plot(steps, means, color=color, label=label)
        axis.set(xlabel="step", ylabel="mean reward of the batch", title=f"policy for the user {user!r}")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(made, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--contrast", action="store_true", help="train on own minus other reward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    smollm2_data.quiet()
    record, halves = smollm2_data.Record(arguments.results, environment()), Halves(arguments)
    base = record.find(user="none", asked=N_ASKED)
    if not base:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        record.add({"user": "none", "asked": N_ASKED} | judge(model, reward_model(arguments.work), halves, arguments))
        base = record.rows[-1]
    print("before", base["mean"], flush=True)
    rows = []
    for user in USERS:
        cell = {"user": user, "contrast": arguments.contrast, "seed": arguments.seed, "steps": STEPS}
        cell["asked"] = N_ASKED
        cell["learning_rate"] = RATE
        if not record.find(**cell):
            options = {"contrast": arguments.contrast, "seed": arguments.seed, "arguments": arguments}
            row = cell | train_policy(user, halves=halves, **options)
            record.add(row | {"change": changes(row, base)})
        rows.append(record.find(**cell))
        print(user, rows[-1]["mean"], rows[-1]["change"], flush=True)
    print("between the policies", between(rows))
    if not arguments.contrast:
        figure(rows, arguments.results.with_name("lore_smollm2.png"))


if __name__ == "__main__":
    main()
