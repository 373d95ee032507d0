"""LoRe end to end on SmolLM2-135M: two simulated kinds of user, told apart from text, then one policy for each.

Paper:    LoRe, arXiv 2504.14439; data: Anthropic's HH pairs relabelled for "helpful" and "harmless" (VPL, arXiv 2408.10075).
Command:  python benchmarks/lore_smollm2.py --model MODEL --data DIR --work WORK --subspace SUBSPACE
          (MODEL and DIR: see benchmarks/smollm2_data.py; SUBSPACE: WORK/recycled/subspace of benchmarks/smollm2.py)
Hardware: 1 CPU core with bf16 instructions; 71 s of CPU for each of the first two rewards, the rest not timed.
          Started again, it goes on where it stopped.
Writes:   benchmarks/results/lore_smollm2.json and .png.

reward  `LoReTrainer` on the last turns of the dialogues, both users mixed, held-out pairs of each judged apart. With LoRA and
        in the recycled subspace; and LoRA with one row (B = 1), which is one reward for both: what
        two rows gain over it is what personalisation is worth here.
policy  `GRPOTrainer` with `reward_func` of the LoRA reward model, once for each user on the same prompts; both users' rewards are
        logged, only the own one is trained on. Then all three policies (the base among them) answer held-out prompts.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean, stdev

import datasets
import smollm2_data
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from timing import environment
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from eigenpeft import EigenLoraConfig, LowRankRewardModel, PrincipalSubspace
from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.subspace import random_subspace
from eigenpeft.trainers import LoReConfig, LoReTrainer

RESULTS = Path(__file__).parent / "results" / "lore_smollm2.json"
USERS = ("helpful", "harmless")
REWARD_STEPS, POLICY_STEPS = 150, 16
LONGEST = 240  # characters of a prompt and its answer
# method, rows of the basis, learning rate: those that benchmarks/smollm2.py chose for SFT
REWARDS = (("LoRA r16", 2, 2e-3), ("EigenLoRA", 2, 1e-2), ("LoRA r16", 1, 2e-3))
COMMON = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


def adapter(method, subspace):
    if method == "LoRA r16":
        return LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    if method == "random subspace":
        subspace = random_subspace(like=subspace)
    return EigenLoraConfig(subspace=subspace, r=16, lora_alpha=32, task_type="SEQ_CLS")


def train_reward(method, n_basis, rate, *, seed, arguments):
    """One row of results; the model goes to WORK/lore."""
    rows = smollm2_data.pairs(arguments.data, longest=LONGEST, n_test=64)
    held_out = {name: [row for row in rows["test"] if row["user_id"] == name] for name in USERS}
    start = time.process_time()
    set_seed(seed)
    trainer = LoReTrainer(
        str(arguments.model),
        LoReConfig(
            str(arguments.work / "runs" / "lore"),
            n_basis=n_basis,
            learning_rate=rate,
            user_learning_rate=0.1,  # twice the default: the run is short
            max_steps=REWARD_STEPS,
            warmup_steps=REWARD_STEPS // 10,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            seed=seed,
            **COMMON,
        ),
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset={name: Dataset.from_list(found) for name, found in held_out.items()},
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=adapter(method, PrincipalSubspace.from_pretrained(arguments.subspace)),
    )
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    metrics = trainer.evaluate()
    model = trainer.reward_model()
    model.save_pretrained(arguments.work / "lore" / f"{method} {n_basis} {seed}")
    wanted = ("accuracy", "population_accuracy", "loss")
    return {
        "parameters": parameters,
        "held_out": {name: {key: round(metrics[f"eval_{name}_{key}"], 4) for key in wanted} for name in USERS},
        "weights": {name: [round(w, 4) for w in model.user_weights([name])[0].tolist()] for name in USERS},
        "cosine_of_heads": round(
            torch.cosine_similarity(model.reward_head("helpful"), model.reward_head("harmless"), dim=0).item(), 4
        ),
        "curves": {
            key: [[log["step"], round(log[key], 4)] for log in trainer.state.log_history if key in log]
            for key in ("loss", "accuracy", "population_accuracy")
        },
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def prompts(data, user, *, split, n):
    """Prompts of both users' pairs, all asked in the name of one of them."""
    other = USERS[1 - USERS.index(user)]
    rows = [row for row in smollm2_data.pairs(data, longest=LONGEST, n_test=64)[split] if len(row["prompt"]) <= 160][:n]
    return Dataset.from_list([{"prompt": row["prompt"], "own": user, "other": other} for row in rows])


def train_policy(user, *, seed, arguments):
    rewards = LowRankRewardModel.from_pretrained(arguments.work / "lore" / f"LoRA r16 2 {seed}")
    rewards.backbone.to(torch.bfloat16)
    start = time.process_time()
    set_seed(seed)
    trainer = GRPOTrainer(
        str(arguments.model),
        reward_funcs=[rewards.reward_func(user_column=column, batch_size=16) for column in ("own", "other")],
        args=GRPOConfig(
            str(arguments.work / "runs" / "policy"),
            reward_weights=[1.0, 0.0],
            learning_rate=1e-3,
            beta=0.0,
            max_steps=POLICY_STEPS,
            warmup_steps=3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=24,
            seed=seed,
            **COMMON,
        ),
        train_dataset=prompts(arguments.data, user, split="train", n=400),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    history = trainer.state.log_history
    names = {column: f"rewards/lore_{column}/mean" for column in ("own", "other")}
    names |= {"length": "completions/mean_length"}
    curves = {name: [[log["step"], round(log[key], 4)] for log in history if key in log] for name, key in names.items()}
    judged = judge_policy(trainer.model, rewards, arguments)
    return {"held_out": judged, "curves": curves, "cpu_seconds": round(time.process_time() - start, 1)}


@torch.no_grad()
def judge_policy(model, rewards, arguments, *, n=48):
    """Mean reward to each user of sampled answers to held-out prompts, the same random numbers for every policy."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    asked = prompts(arguments.data, USERS[0], split="test", n=n)["prompt"]
    set_seed(1)
    answers = []
    for start in range(0, len(asked), 16):
        batch = tokenizer(asked[start : start + 16], return_tensors="pt", padding=True)
        tokens = model.eval().generate(**batch, max_new_tokens=24, do_sample=True, temperature=1.0, top_k=0)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = {}
    for user in USERS:
        values = rewards.reward_func(batch_size=16)(prompts=asked, completions=answers, user_id=[user] * len(asked))
        found[user] = {"mean": round(fmean(values), 4), "sem": round(stdev(values) / len(values) ** 0.5, 4)}
    return found | {"mean_characters": round(fmean(map(len, answers)), 1)}


def figure(record, path):
    """Rewards of both users along both trainings."""
    made, axes = new_figure(1, 2, width=9, height=3.6)
    for axis, user in zip(axes, USERS, strict=True):
        row = record.find(stage="policy", user=user, seed=0)
        for name, colour in (("own", "tab:blue"), ("other", "tab:orange")):
            steps, values = zip(*row["curves"][name], strict=True)
            means = [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            whose = user if name == "own" else USERS[1 - USERS.index(user)]
            axis.plot(steps, values, color=colour, alpha=0.25)
            axis.plot(
                steps, means, color=colour, label=f"reward to {whose}" + (" (trained on)" if name == "own" else "")
            )
        axis.set(xlabel="step", ylabel="mean reward of the batch", title=f"policy for the user {user!r}")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(made, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "work", "subspace"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=["reward", "policy"], choices=["reward", "policy"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    record, seed = smollm2_data.Record(arguments.results, environment()), arguments.seed
    for method, n_basis, rate in REWARDS if "reward" in arguments.stages else ():
        cell = {"stage": "reward", "method": method, "n_basis": n_basis, "learning_rate": rate, "seed": seed}
        cell["steps"] = REWARD_STEPS
        if not record.find(**cell):
            record.add(cell | train_reward(method, n_basis, rate, seed=seed, arguments=arguments))
            print({key: value for key, value in record.rows[-1].items() if key != "curves"}, flush=True)
    for user in USERS if "policy" in arguments.stages else ():
        if not record.find(stage="policy", user=user, seed=seed):
            row = {"stage": "policy", "user": user, "seed": seed, "steps": POLICY_STEPS, "learning_rate": 1e-3}
            record.add(row | train_policy(user, seed=seed, arguments=arguments))
            print(record.rows[-1]["held_out"], flush=True)
    if "policy" in arguments.stages and not record.find(stage="policy", user="none", seed=seed):
        rewards = LowRankRewardModel.from_pretrained(arguments.work / "lore" / f"LoRA r16 2 {seed}")
        rewards.backbone.to(torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        record.add(
            {"stage": "policy", "user": "none", "seed": seed, "held_out": judge_policy(base, rewards, arguments)}
        )
        print(record.rows[-1]["held_out"], flush=True)
    if "policy" in arguments.stages:
        figure(record, arguments.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
