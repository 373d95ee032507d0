"""Figure and tables of the real runs on SmolLM2, from benchmarks/results/smollm2.json.

Command:  python benchmarks/smollm2_report.py
Hardware: any; seconds.
Writes:   benchmarks/results/smollm2.png, and the tables of docs/real-runs.md on stdout.
"""

import json
from pathlib import Path
from statistics import fmean

from eigenpeft.report.plots import new_figure, save_figure

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
# run: title, the training curve, and what is compared at the end: (heading, metric, "last" or steps to average)
RUNS = {
    "sft_t0": ("SFT, qasc", "loss", (("held-out loss", "eval_loss"), ("token accuracy", "eval_mean_token_accuracy"))),
    "sft_gsm8k": (
        "SFT, gsm8k",
        "loss",
        (("held-out loss", "eval_loss"), ("token accuracy", "eval_mean_token_accuracy")),
    ),
    "dpo": ("DPO, helpful", "loss", (("held-out loss", "eval_loss"), ("accuracy", "eval_rewards/accuracies"))),
    "reward": ("Reward, helpful", "loss", (("held-out loss", "eval_loss"), ("accuracy", "eval_accuracy"))),
    "grpo": ("GRPO, sums", "reward", (("reward, last 10 steps", "reward"), ("KL, last 10 steps", "kl"))),
}
COLORS = {
    "EigenLoRA": "tab:blue",
    "random subspace": "tab:gray",
    "LoRA, equal parameters": "tab:green",
    "LoRA r16": "tab:orange",
}


def smooth(values, width=8):
    """Mean of each value and those up to `width` - 1 before it."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def figure(rows, path):
    made, axes = new_figure(1, len(RUNS), width=17, height=3.6)
    for axis, (name, (title, metric, _)) in zip(axes, RUNS.items(), strict=True):
        for row in (row for row in rows if row["run"] == name):
            steps, values = zip(*row["curves"][metric], strict=True)
            color = COLORS[row["method"]]
            axis.plot(steps, smooth(values), color=color, linewidth=1.2, label=row["method"])
            if metric == "loss":
                held_out = row["curves"].get("eval_loss", [])
                axis.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, linewidth=0.7)
        axis.set(xlabel="step", ylabel=f"{metric}, mean of 8 steps", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    made.suptitle("SmolLM2-135M, one seed: training curves (lines) and held-out loss (dots)")
    save_figure(made, path)


def last(row, metric, steps=10):
    """The last value of a held-out metric, or the mean over the last steps of a training metric."""
    values = [value for _, value in row["curves"].get(metric, [])]
    if not values:
        return float("nan")
    return values[-1] if metric.startswith("eval_") else fmean(values[-steps:])


def start(row, metric):
    """The value before training (held-out metrics) or in the first step (others); empty if it was not judged."""
    step, value = next(iter(row["curves"].get(metric, [])), (None, None))
    return f"{value:.3f}" if step == 0 or (step == 1 and not metric.startswith("eval_")) else ""


def table(rows):
    for name, (title, _, compared) in RUNS.items():
        found = sorted((row for row in rows if row["run"] == name), key=lambda row: list(COLORS).index(row["method"]))
        if not found:
            continue
        print(f"\n**{title}** ({found[0]['steps']} steps of {found[0]['batch_size']})\n")
        print("| | learning rate |", *(f"{heading} |" for heading, _ in compared), "CPU s |")
        print("|---" * (len(compared) + 3) + "|")
        print("| start |", "|", *(f"{start(found[0], metric)} |" for _, metric in compared), "|")
        for row in found:
            values = (f"{last(row, metric):.3f} |" for _, metric in compared)
            print(f"| {row['method']} | {row['learning_rate']:.2g} |", *values, f"{row['cpu_seconds']:.0f} |")


def main():
    rows = json.loads(RESULTS.read_text())["rows"]
    figure(rows, RESULTS.with_suffix(".png"))
    table(rows)
    print("\nTuning, held-out loss:")
    for row in (row for row in rows if row["run"] == "tune"):
        print(f"{row['method']:24} {row['learning_rate']:<7g} {row['curves']['eval_loss'][-1][1]:.3f}")


if __name__ == "__main__":
    main()
