"""LoRe on simulated users with a known answer: accuracy and CPU time beside the published procedure and the controls.

Command:  python benchmarks/lore_simulated.py small spread few_shot users   (any of them; larger data: lore_large.py)
Hardware: CPU, one thread; small and spread 1 min each, few_shot 10 s, users 10 s.
Writes:   benchmarks/results/lore_simulated.json, one entry a part, and lines on stdout. Times are CPU seconds of this process.

The published procedure is re-implemented from the paper's description (arXiv 2504.14439): W, V ~ N(0, 1), reward
`e(x) V softmax(w_u) / 100`, mean -log σ of each user summed over users, joint Adam at 0.5 for 1,000 full-batch steps;
new users: V fixed, Adam at 0.1 for 500 steps. It is vectorised over users here, which the authors' code is not. It has
no reference head and no prior; LoRe with priors gets the reference head, as one would have it. All settings of ours are
fixed in advance (n_basis=5, shared_scale=2, deviation_scale=2,
concentration=1, strength=1) except in the rows called "auto", which
choose everything by held-out comparisons and whose time includes that. Keeping leading directions helps by construction
where the true rewards lie in them; the rows with "signal in all directions" do without that help.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

import eigenpeft
from eigenpeft.linalg.orthogonal import principal_angles
from eigenpeft.linalg.preference.users import fit_all_user_weights
from eigenpeft.reward import LoReFitter, LowRankRewardModel
from eigenpeft.reward.evaluation.simulation import SimulatedUsers

RESULTS = Path(__file__).parent / "results" / "lore_simulated.json"
FIXED = {"shared_scale": 2.0, "deviation_scale": 2.0, "concentration": 1.0, "strength": 1.0}


def published_fit(differences, rows, n_users, n_basis, *, steps, seed):
    """Joint Adam; returns (n_basis, d) heads and user weights."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randn(n_users, n_basis, generator=generator).requires_grad_()
    basis = torch.randn(differences.shape[1], n_basis, generator=generator).requires_grad_()
    of_pair = 1 / torch.bincount(rows, minlength=n_users)[rows].float()
    adam = torch.optim.Adam([user, basis], lr=0.5)
    for _ in range(steps):
        adam.zero_grad()
        margins = ((differences @ basis) * user.softmax(dim=1)[rows]).sum(dim=1) / 100
        (torch.nn.functional.softplus(-margins) * of_pair).sum().backward()
        adam.step()
    return basis.detach().T / 100, user.detach().softmax(dim=1)


def published_users(by_basis, rows, n_users, *, seed, one_by_one, steps=500):
    """Adam on each new user's logits, the basis fixed."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n_users, by_basis.shape[1], generator=generator)
    groups = [[u] for u in range(n_users)] if one_by_one else [list(range(n_users))]
    weights = torch.empty_like(start)
    for group in groups:
        mask = torch.isin(rows, torch.tensor(group))
        z, own = by_basis[mask], rows[mask] - group[0]
        of_pair = 1 / torch.bincount(own, minlength=len(group))[own].float()
        logits = start[group].clone().requires_grad_()
        adam = torch.optim.Adam([logits], lr=0.1)
        for _ in range(steps):
            adam.zero_grad()
            margins = (z * logits.softmax(dim=1)[own]).sum(dim=1)
            (torch.nn.functional.softplus(-margins) * of_pair).sum().backward()
            adam.step()
        weights[group] = logits.detach().softmax(dim=1)
    return weights


class Setting:
    """Train, few-shot and test comparisons of seen and new users."""

    def __init__(self, n_users, n_pairs, n_features, *, n_new, n_shots=10, n_test=50, seed=0, **options):
        self.users = SimulatedUsers(
            n_users + n_new,
            n_features=n_features,
            n_basis=5,
            margin_scale=10.0,
            shared=0.5,
            reference_noise=0.3,
            seed=seed,
            **options,
        )
        seen, new = range(n_users), range(n_users, n_users + n_new)
        self.n_users, self.n_new = n_users, n_new
        self.train, self.train_rows, _ = self.draw(n_pairs, 1000 + seed, seen)
        self.test, self.test_rows, self.test_truth = self.draw(n_test, 2000 + seed, seen)
        self.few, self.few_rows, _ = self.draw(n_shots, 3000 + seed, new)
        self.query, self.query_rows, self.query_truth = self.draw(n_test, 4000 + seed, new)

    def draw(self, n_pairs, seed, users):
        pairs = self.users.pairs(n_pairs, seed=seed, users=users)
        rows = torch.tensor([int(user[5:]) for user in pairs.user_ids]) - users.start
        return pairs.chosen - pairs.rejected, rows, pairs.true_margins

    def scores(self, heads, weights, new_weights, population=None):
        def share(margins):
            return round((margins > 0).float().mean().item(), 4)

        found = {
            "seen_users_new_prompts": share(((self.test @ heads.T) * weights[self.test_rows]).sum(dim=1)),
            "new_users": share(((self.query @ heads.T) * new_weights[self.query_rows]).sum(dim=1)),
        }
        if population is not None:
            found["new_users_without_history"] = share(self.query @ (population @ heads))
        return found

    def fit(self, **options):
        """Ours, timed, with the scores of its users."""
        nothing = torch.zeros(1, 1).expand_as(self.train)
        start = time.process_time()
        fitter = LoReFitter(**options)
        fitter.fit(self.train, nothing, user_ids=self.train_rows.tolist(), reference_head=self.users.reference_head)
        seconds = time.process_time() - start
        model = fitter.model_
        weights = model.user_weights(list(range(self.n_users)))
        new = fit_all_user_weights(
            self.few @ model.reward_basis.T, self.few_rows, n_users=self.n_new, concentration=model.concentration
        ).float()
        angle = principal_angles(model.reward_basis, self.users.reward_basis)[-1].rad2deg().item()
        return model, {
            "cpu_seconds": round(seconds, 2),
            "n_basis": model.n_basis,
            "converged": model.info["converged"],
            "largest_angle_to_the_true_span_degrees": round(angle, 1),
            **self.scores(model.reward_basis, weights, new, model.population_weights),
        }

    def bounds(self):
        one = torch.ones(self.n_users, 1)
        return {
            "oracle": {
                "seen_users_new_prompts": round((self.test_truth > 0).float().mean().item(), 4),
                "new_users": round((self.query_truth > 0).float().mean().item(), 4),
            },
            "reference head": self.scores(self.users.reference_head[None], one, torch.ones(self.n_new, 1)),
        }


def small():
    """200 users x 30 comparisons x 512 features; rewards in 64 leading directions."""
    return [_small(seed, n_signal=64) for seed in (0, 1, 2)]


def spread():
    """The same with rewards in all directions."""
    return [_small(seed, n_signal=512) for seed in (0, 1, 2)]


def _small(seed, *, n_signal):
    setting = Setting(200, 30, 512, n_new=100, seed=seed, n_signal=n_signal)
    rows = setting.bounds()
    _, rows["one shared head (B = 1)"] = setting.fit(n_basis=1, shared_scale=2.0)
    _, rows["LoRe, ours, B = 5"] = setting.fit(n_basis=5, **FIXED, seed=seed)
    _, rows["LoRe, ours, B = 5, 128 directions"] = setting.fit(n_basis=5, **FIXED, seed=seed, n_components=128)
    _, rows["LoRe, ours, auto"] = setting.fit(seed=seed)
    rows["B by held-out comparisons"] = [
        {**{k: v for k, v in one.items() if "nll" in k or "accuracy" in k or k in ("n_basis", "deviation_scale")}}
        for one in LoReFitter(n_basis=(1, 2, 3, 5, 8, 12), deviation_scale=2.0, seed=seed)
        .fit(
            setting.train,
            torch.zeros(1, 1).expand_as(setting.train),
            user_ids=setting.train_rows.tolist(),
            reference_head=setting.users.reference_head,
        )
        .model_.info["candidates"]
    ]
    rows["test by B"] = {
        n: setting.fit(n_basis=n, **FIXED, seed=seed)[1]["seen_users_new_prompts"] for n in (1, 2, 3, 5, 8, 12)
    }
    start = time.process_time()
    heads, weights = published_fit(setting.train, setting.train_rows, 200, 5, steps=1000, seed=seed)
    seconds = time.process_time() - start
    new = published_users(setting.few @ heads.T, setting.few_rows, 100, seed=seed, one_by_one=False)
    rows["LoRe, published procedure"] = {
        "cpu_seconds": round(seconds, 2),
        "training_accuracy": round(
            (((setting.train @ heads.T) * weights[setting.train_rows]).sum(dim=1) > 0).float().mean().item(), 4
        ),
        **setting.scores(heads, weights, new, weights.mean(dim=0)),
    }
    for name in ("LoRe, ours, B = 5", "LoRe, ours, B = 5, 128 directions"):
        rows[name]["times_less_cpu_than_published"] = round(seconds / rows[name]["cpu_seconds"], 1)
    for name, row in rows.items():
        print(seed, name, row, flush=True)
    return rows


def few_shot():
    """100 new users, 0 to 50 comparisons each, one basis for both procedures."""
    setting = Setting(200, 30, 512, n_new=100, n_shots=50, n_test=200)
    model, _ = setting.fit(n_basis=5, **FIXED)
    heads = model.reward_basis
    by_basis, queries = setting.few @ heads.T, setting.query @ heads.T
    rank = torch.arange(50).repeat(100)

    def accuracy(weights):
        return round(((queries * weights[setting.query_rows]).sum(dim=1) > 0).float().mean().item(), 4)

    result = {"no history: the population": accuracy(model.population_weights.repeat(100, 1))}
    for n in (1, 2, 3, 5, 10, 20, 50):
        z, rows = by_basis[rank < n], setting.few_rows[rank < n]
        times = []
        for _ in range(5):
            start = time.process_time()
            ours = fit_all_user_weights(z, rows, n_users=100, concentration=model.concentration).float()
            times.append(time.process_time() - start)
        start = time.process_time()
        theirs = published_users(z, rows, 100, seed=n, one_by_one=False)
        together = time.process_time() - start
        row = {
            "ours": accuracy(ours),
            "published": accuracy(theirs),
            "ours_ms": round(1e3 * sorted(times)[2], 2),
            "published_vectorised_ms": round(1e3 * together, 1),
        }
        if n == 10:
            start = time.process_time()
            published_users(z, rows, 100, seed=n, one_by_one=True)
            row["published_user_by_user_ms"] = round(1e3 * (time.process_time() - start), 1)
            row["times_faster_than_user_by_user"] = round(row["published_user_by_user_ms"] / row["ours_ms"], 1)
            row["times_faster_than_vectorised"] = round(row["published_vectorised_ms"] / row["ours_ms"], 1)
        result[f"{n} comparisons"] = row
        print(n, row)
    return result


def users():
    """100,000 users x 10 comparisons x 8 basis rows."""
    generator = torch.Generator().manual_seed(0)
    n_users = 100_000
    z = 2 * torch.randn(10 * n_users, 8, generator=generator)
    rows = torch.arange(n_users).repeat_interleave(10)
    start = time.process_time()
    weights = fit_all_user_weights(z, rows, n_users=n_users, concentration=torch.full((8,), 0.125))
    result = {"cpu_seconds": round(time.process_time() - start, 2)}
    model = LowRankRewardModel(torch.randn(8, 16, generator=generator))
    ids = [f"user-{i}" for i in range(n_users)]
    model.users.put(ids, user_weights=weights, n_pairs=[10] * n_users)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        result["table_megabytes"] = round((Path(folder) / "lore_users.safetensors").stat().st_size / 1e6, 1)
        again = LowRankRewardModel.from_pretrained(folder)
        start = time.perf_counter()
        again.user_weights(ids[::100])
        result["lookup_microseconds_a_user"] = round((time.perf_counter() - start) * 1e6 / 1000, 1)
    print(result)
    return result


def main():
    parts = {function.__name__: function for function in (small, spread, few_shot, users)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=parts)
    disable_progress_bars()
    torch.set_num_threads(1)
    for name in parser.parse_args().parts:
        write_results(read_results() | {name: parts[name]()})


def read_results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(known):
    known["environment"] = {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(part for part in sys.argv[1:] if part.isalpha())}",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
