"""Reinforcement learning with few numbers: GRPO on sums, reward by the number of trained values, recycled beside random.

Papers:   GRPO, arXiv 2402.03300; TinyLoRA (thirteen numbers), arXiv 2602.04118; EigenLoRAx, arXiv 2502.04700.
Command:  python benchmarks/grpo.py zoo tune test --model MODEL --work WORK    (MODEL: smollm2/model, from `make smollm2`)
          python benchmarks/grpo.py report                                     (table and figure)
Hardware: 1 CPU core; 27 CPU minutes on a busy machine. Started again, it goes on where it stopped.
Writes:   benchmarks/results/grpo.jsonl, a row per cell; with report, benchmarks/results/grpo.json and grpo.png.

SmolLM2-135M-Instruct, float32. "1+1=2", a line end and "A+B=" with A and B from 2 to 15. A completion ends with its first token
that is no digit, or after 3 tokens; its reward is 1 if its digits are the sum and something else ended them, else 0. Every
method adapts q_proj and v_proj of all layers.

GRPO as `GRPOTrainer` has it by default, without a KL term: advantages divided by their standard deviation in the group, each
batch used once, so that all ratios are 1 and nothing is clipped; the mean over all tokens of the batch; AdamW without decay,
gradients clipped at norm 1. It is written out here because prompts are computed once for their 8 completions and the pass that
samples is the one that is differentiated, which takes a quarter of the trainer's time. recipes/grpo.py is the trainer's.

zoo   Four LoRAs (r 8), one per related skill, by supervised tuning: differences, successors, the larger of two numbers, sums in
      words. None sees a sum that is tested. Their subspace has 8 components per side.
tune  Three learning rates per method at seed 100, and a fourth beyond the best where that is the end of the three; the best is
      the one with the highest expected reward on sums that are used for nothing else. As many steps as in the test.
test  Three seeds per method at its rate, equal steps. Judged on held-out sums by the expected reward, which is the probability
      that a completion sampled at temperature 1 is right, and by greedy answers. Both are exact: the probability of the right
      digits, and of all that is no digit after them, from one forward pass.

Random: random orthonormal bases of the same sizes, other ones for each seed.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import fmean, stdev

import smollm2_data
import torch
from peft import LoraConfig, TinyLoraConfig, get_peft_model
from timing import environment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, set_seed

from eigenpeft import AdapterCollection, EigenLoraConfig, SubspaceBuilder
from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.tuners import control_config

RESULTS = Path(__file__).parent / "results" / "grpo.jsonl"
TARGETS = ["q_proj", "v_proj"]
SMALLEST, LARGEST, N_TUNE, N_TEST = 2, 15, 32, 64
STEPS, PROMPTS, COMPLETIONS, TOKENS, K = 12, 3, 8, 3, 8
ZOO_STEPS, ZOO_BATCH, ZOO_RATE = 12, 8, 3e-3
SEEDS, TUNING_SEED = (0, 1, 2), 100
# Method to its three learning rates.
METHODS = {
    "EigenLoRA diagonal, recycled": (0.01, 0.03, 0.1),
    "EigenLoRA diagonal, random": (0.01, 0.03, 0.1),
    "EigenLoRA full, recycled": (0.003, 0.01, 0.03),
    "EigenLoRA full, random": (0.003, 0.01, 0.03),
    "TinyLoRA, 13 in all": (0.01, 0.03, 0.1),
    "LoRA r 1": (0.001, 0.003, 0.01),
    "LoRA r 8": (0.0003, 0.001, 0.003),
}


def sums(split: str) -> list[tuple[int, int]]:
    """Pairs of numbers of one split: each pair is in one of "test", "tune" and "train"."""
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = random.Random(0).sample([(a, b) for a in numbers for b in numbers], len(numbers) ** 2)
    bounds = {"test": (0, N_TEST), "tune": (N_TEST, N_TEST + N_TUNE), "train": (N_TEST + N_TUNE, None)}
    return pairs[slice(*bounds[split])]


def question(a: int, b: int) -> str:
    return f"1+1=2\n{a}+{b}="


def skills() -> dict[str, list[tuple[str, str]]]:
    """Prompts and answers of the skills that the zoo's adapters learn, made from the training pairs."""
    pairs = sums("train")
    return {
        "difference": [(f"{max(p)}-{min(p)}=", str(max(p) - min(p))) for p in pairs],
        "successor": [(f"{a + b}+1=", str(a + b + 1)) for a, b in pairs],
        "larger": [(f"max({a},{b})=", str(max(a, b))) for a, b in pairs],
        "words": [(f"{a} plus {b} is ", str(a + b)) for a, b in pairs],
    }


class Place:
    """Model, tokenizer and folders that all cells share."""

    def __init__(self, arguments: argparse.Namespace):
        self.model_dir, self.work = arguments.model, arguments.work
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir, padding_side="left")
        self.subspace = self.work / "subspace"
        self.digits = torch.tensor(self.tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]))

    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)


def train_zoo(place: Place) -> None:
    """The adapters and their subspace, unless they are there."""
    for number, (skill, rows) in enumerate(skills().items()):
        out = place.work / "zoo" / skill
        if not (out / "adapter_config.json").is_file():
            started = time.process_time()
            losses = train_skill(place, rows, out, seed=10 + number)
            print(
                f"zoo {skill}: loss {losses[0]:.2f} to {losses[-1]:.2f}, {time.process_time() - started:.0f} s",
                flush=True,
            )
    if not place.subspace.exists():
        with AdapterCollection.from_pretrained(place.work / "zoo") as collection:
            SubspaceBuilder(K).fit(collection).subspace_.save_pretrained(place.subspace)


def train_skill(place: Place, rows: list[tuple[str, str]], out: Path, *, seed: int) -> list[float]:
    set_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(place.model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=ZOO_RATE, weight_decay=0.0)
    losses = []
    for _ in range(ZOO_STEPS):
        batch = random.sample(rows, ZOO_BATCH)
        tokens, mask, answers = encoded(place.tokenizer, batch)
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[answers[:, 1:]], tokens[:, 1:][answers[:, 1:]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(out)
    return losses


def encoded(tokenizer, rows: list[tuple[str, str]]):
    """Tokens of prompt, answer and line end, padded on the left; mask; where the answer and the line end are."""
    parts = [(tokenizer(prompt).input_ids, tokenizer(answer + "\n").input_ids) for prompt, answer in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in parts)
    shape = (len(parts), length)
    tokens, mask = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.long)
    answers = torch.zeros(shape, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(parts):
        start = length - len(prompt) - len(answer)
        tokens[i, start:] = torch.tensor(prompt + answer)
        mask[i, start:] = 1
        answers[i, length - len(answer) :] = True
    return tokens, mask, answers


@torch.no_grad()
def judge(model, place: Place, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Expected reward and share of right greedy answers, exact."""
    digits = place.digits
    expected, greedy = [], []
    for start in range(0, len(pairs), 32):
        rows = [(question(a, b), str(a + b)) for a, b in pairs[start : start + 32]]
        tokens, mask, answers = encoded(place.tokenizer, rows)
        logits = model.eval()(input_ids=tokens, attention_mask=mask, logits_to_keep=TOKENS + 1).logits
        probabilities, tokens, answers = logits.softmax(-1)[:, :-1], tokens[:, -TOKENS - 1 :], answers[:, -TOKENS - 1 :]
        for row, want, is_answer in zip(probabilities, tokens[:, 1:], answers[:, 1:], strict=True):
            found = row[is_answer]  # the last one is where the line end stands: whatever is no digit is right
            said = found[:-1].gather(1, want[is_answer][:-1, None])[:, 0]
            expected.append(float(said.prod() * (1 - found[-1, digits].sum())))
            best = found.argmax(-1)
            greedy.append(float((best[:-1] == want[is_answer][:-1]).all() and not (best[-1] == digits).any()))
    return {"expected_reward": round(fmean(expected), 4), "greedy": round(fmean(greedy), 4)}


def peft_config(method: str, place: Place, seed: int):
    shared = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method.startswith("LoRA"):
        rank = int(method.rsplit(" ", 1)[1])
        return LoraConfig(r=rank, lora_alpha=2 * rank, **shared)
    if method.startswith("TinyLoRA"):
        return TinyLoraConfig(u=13, weight_tying=1.0, projection_seed=seed, **shared)
    core = method.split()[1].rstrip(",")
    config = EigenLoraConfig(subspace=str(place.subspace), core=core, r=K, lora_alpha=2 * K, task_type="CAUSAL_LM")
    return config if method.endswith("recycled") else control_config(config, control="random", seed=seed)


def sampled(model, place: Place, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Completions of some sums, with the log-probabilities that are differentiated.

    Returns:
        log-probability of every sampled token, index of its completion, reward of every completion, and the tokens, padded with
        -1: (n_tokens,), (n_tokens,), (n_prompts * COMPLETIONS,) and (n_prompts * COMPLETIONS, TOKENS).
    """
    prompts = place.tokenizer([question(a, b) for a, b in pairs], return_tensors="pt", padding=True)
    mask = prompts.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    logits = model(input_ids=prompts.input_ids, logits_to_keep=1, **options).logits[:, -1]
    cache.batch_repeat_interleave(COMPLETIONS)
    mask, position = mask.repeat_interleave(COMPLETIONS, 0), positions[:, -1:].repeat_interleave(COMPLETIONS, 0)
    logps = logits.log_softmax(-1).repeat_interleave(COMPLETIONS, 0)
    alive, found, owners = torch.arange(len(logps)), [], []
    tokens = torch.full((len(logps), TOKENS), -1)
    for step in range(TOKENS):
        choice = torch.multinomial(logps.detach().exp(), 1)
        found.append(logps.gather(1, choice)[:, 0])
        owners.append(alive)
        tokens[alive, step] = choice[:, 0]
        kept = torch.isin(choice[:, 0], place.digits).nonzero()[:, 0]
        if step == TOKENS - 1 or not len(kept):
            break
        alive, position = alive[kept], position[kept] + 1
        mask = torch.cat((mask[kept], mask.new_ones(len(kept), 1)), dim=1)
        cache.batch_select_indices(kept)
        options = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        logps = model(input_ids=choice[kept], **options).logits[:, -1].log_softmax(-1)
    wanted = [str(a + b) for a, b in pairs for _ in range(COMPLETIONS)]
    rewards = torch.tensor([is_right(row, want, place) for row, want in zip(tokens.tolist(), wanted, strict=True)])
    return torch.cat(found), torch.cat(owners), rewards, tokens


def is_right(tokens: list[int], wanted: str, place: Place) -> float:
    """1 where the digits are those wanted and something else ended them, else 0."""
    digits = place.digits.tolist()
    said = [token for token in tokens if token >= 0]
    *number, end = said
    return float(end not in digits and number == [digits[int(digit)] for digit in wanted])


def run_cell(method: str, rate: float, seed: int, pairs: list[tuple[int, int]], place: Place) -> dict:
    """Train one method once; a row of results with the rewards of its steps."""
    started = time.process_time()
    set_seed(seed)
    model = get_peft_model(place.model(), peft_config(method, place, seed)).eval()  # there is no dropout
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    asked, rewards = random.Random(seed), []
    for step in range(STEPS):
        logps, owners, reward, _ = sampled(model, place, asked.sample(sums("train"), PROMPTS))
        rewards.append(float(reward.mean()))
        groups = reward.view(PROMPTS, COMPLETIONS)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        if advantages.any():
            (-(advantages[owners] * logps).mean()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        else:  # as the trainer does: a gradient of zero, and momentum goes on
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
    judged = judge(model, place, pairs)
    rewards = [round(value, 4) for value in rewards]
    seconds = round(time.process_time() - started, 1)
    return {"trained": sum(map(torch.numel, trained)), **judged, "rewards": rewards, "cpu_seconds": seconds}


@torch.no_grad()
def check_sampling(place: Place) -> dict[str, float]:
    """Log-probabilities of sampled tokens against those of whole sequences without a cache."""
    set_seed(0)
    model, pairs = place.model().eval(), sums("train")[:PROMPTS]
    logps, owners, _, tokens = sampled(model, place, pairs)
    sums_of_logps = torch.zeros(len(tokens)).index_add(0, owners, logps)
    largest = 0.0
    for i, row in enumerate(tokens.tolist()):
        said = [token for token in row if token >= 0]
        prompt = place.tokenizer(question(*pairs[i // COMPLETIONS])).input_ids
        whole = model(input_ids=torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = whole.gather(1, torch.tensor(said)[:, None]).sum()
        largest = max(largest, float((expected - sums_of_logps[i]).abs()))
    return {"largest_difference_of_log_probabilities": largest}


class Rows:
    """Rows of results, one per line of a file; a cell that is there is not run again."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = smollm2_data.read(path) if path.exists() else []

    def of(self, **cell) -> list[dict]:
        return [row for row in self.rows if cell.items() <= row.items()]

    def run(self, cell: dict, make) -> dict:
        if not self.of(**cell):
            self.rows.append(cell | make())
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
            print({key: value for key, value in self.rows[-1].items() if key != "rewards"}, flush=True)
        return self.of(**cell)[0]


def tuned_rate(method: str, rows: Rows, place: Place | None) -> float:
    """The best rate; the three and perhaps a fourth are run first, where there is a place to run them."""

    def value(rate: float) -> float:
        cell = {"part": "tune", "method": method, "rate": rate, "steps": STEPS, "seed": TUNING_SEED}
        if place is not None:
            rows.run(cell, lambda: run_cell(method, rate, TUNING_SEED, sums("tune"), place))
        return max((row["expected_reward"] for row in rows.of(**cell)), default=-1.0)

    rates = METHODS[method]
    found = {rate: value(rate) for rate in rates}
    best = max(found, key=found.__getitem__)
    beyond = {rates[0]: rates[0] / 3, rates[-1]: rates[-1] * 3}.get(best)
    if beyond is not None:
        found[round(beyond, 6)] = value(round(beyond, 6))
    return max(found, key=found.__getitem__)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval over two or three seeds."""
    return fmean(values), {2: 12.706, 3: 4.303}[len(values)] * stdev(values) / len(values) ** 0.5


def report(rows: Rows, path: Path) -> None:
    (base,) = rows.of(part="base")
    print(f"base: expected reward {base['expected_reward']:.3f}, greedy {base['greedy']:.3f}\n")
    columns = ("method", "trained values", "rate", "seeds", "expected reward", "greedy", "reward in the last 4 steps")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    table = {"base": {key: base[key] for key in ("expected_reward", "greedy")}}
    for method in METHODS:
        found = rows.of(part="test", method=method, steps=STEPS)
        if len(found) < 2:
            continue
        measures = {key: [row[key] for row in found] for key in ("expected_reward", "greedy")}
        measures["last_steps"] = [fmean(row["rewards"][-4:]) for row in found]
        entry = {key: dict(zip(("mean", "half"), interval(values), strict=True)) for key, values in measures.items()}
        seeds = [row["seed"] for row in found]
        table[method] = {
            "trained": found[0]["trained"],
            "rate": found[0]["rate"],
            "seeds": seeds,
            "values": measures,
            **entry,
        }
        cells = [f"{entry[key]['mean']:.3f} ± {entry[key]['half']:.3f}" for key in measures]
        print(f"| {method} | {found[0]['trained']:,} | {found[0]['rate']:g} | {len(seeds)} | {' | '.join(cells)} |")
    for core in ("diagonal", "full"):
        pair = [f"EigenLoRA {core}, {start}" for start in ("recycled", "random")]
        if all(name in table for name in pair):
            recycled, at_random = (table[name]["values"]["expected_reward"] for name in pair)
            of_both = zip(recycled, at_random, strict=False)  # the seeds that both have
            mean, half = interval([a - b for a, b in of_both])
            table[f"{core}: recycled minus random"] = {"mean": mean, "half": half}
            print(f"\n{core}: recycled minus random, expected reward, per seed: {mean:+.3f} ± {half:.3f}")
    path.with_suffix(".json").write_text(
        json.dumps({"environment": environment(), "table": table}, indent=1) + "\n", encoding="utf-8"
    )
    figure(rows, table, path.with_suffix(".png"))


def figure(rows: Rows, table: dict, path: Path) -> None:
    """Reward by the number of trained values, and along the steps."""
    made, (left, right) = new_figure(1, 2, width=10, height=4)
    left.axhline(table["base"]["expected_reward"], color="gray", linestyle=":", label="base model")
    for i, method in enumerate(name for name in METHODS if name in table):
        entry, color = table[method], f"C{i}"
        values = entry["values"]["expected_reward"]
        left.plot([entry["trained"]] * len(values), values, "o", color=color, alpha=0.5)
        left.plot([entry["trained"]], [fmean(values)], "_", color=color, markersize=18, label=method)
        curves = [row["rewards"] for row in rows.of(part="test", method=method, steps=STEPS)]
        means = [fmean(step) for step in zip(*curves, strict=True)]
        smooth = [fmean(means[max(0, j - 2) : j + 1]) for j in range(len(means))]
        right.plot(range(1, len(smooth) + 1), smooth, color=color)
    left.set(xscale="log", xlabel="trained values", ylabel="expected reward on held-out sums")
    numbers = sorted({table[name]["trained"] for name in METHODS if name in table})
    left.set_xticks(numbers, [f"{number:,}" for number in numbers])
    left.set_xticks([], minor=True)
    left.legend(fontsize=7)
    right.set(xlabel="step", ylabel="reward in training, 3 steps and all seeds")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(made, path, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["zoo", "tune", "test", "report"])
    parser.add_argument("--model", type=Path, default=Path("smollm2/model"))
    parser.add_argument("--work", type=Path, default=Path("grpo-work"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    smollm2_data.quiet()
    rows = Rows(arguments.results)
    if {"zoo", "tune", "test"} & set(arguments.parts):
        place = Place(arguments)
        train_zoo(place)
        rows.run({"part": "base"}, lambda: judge(place.model().eval(), place, sums("test")) | check_sampling(place))
        rates = (
            {method: tuned_rate(method, rows, place) for method in arguments.methods}
            if "tune" in arguments.parts
            else {}
        )
        if "test" in arguments.parts:
            for seed in SEEDS:  # the outer loop: an early end leaves whole seeds
                for method in arguments.methods:
                    rate = rates.get(method) or tuned_rate(method, rows, None)
                    cell = {"part": "test", "method": method, "rate": rate, "steps": STEPS, "seed": seed}
                    rows.run(cell, lambda: run_cell(method, rate, seed, sums("test"), place))  # noqa: B023
    if "report" in arguments.parts:
        report(rows, arguments.results)


if __name__ == "__main__":
    main()
