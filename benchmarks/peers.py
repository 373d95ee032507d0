"""How much of each ΔW survives compression, beside the PyPI packages vlora-dev and lorashare at the same storage.

Command:  python -m venv .peers && .peers/bin/pip install torch==2.13.0 vlora-dev==1.0.0 lorashare==0.1.3
          python benchmarks/peers.py --peers-python .peers/bin/python     (about 3 minutes, one thread)
Writes:   benchmarks/results/peers.json and peers.md.

Each peer runs in its own environment (peers_worker.py), compresses the adapters and writes them back. Errors are measured
here, the same way for all: ‖ΔW - ΔW'‖ / ‖ΔW‖ (Frobenius, scaling included, factor-sized work in float64), the mean over all
adapters and modules. Storage is the bytes of all float32 tensors needed to rebuild every adapter (bases, means, coefficients).
vlora's writer replaces lora_alpha by r; for the comparison its factors get their own lora_alpha back by hand, and the error
as it saves them is told apart. A component of vlora is a whole flattened factor (r times as large as a direction), so that at
the same number K it stores more: "same bytes" takes for eigenpeft the largest K that needs no more bytes than the peer.
"""

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import save_file

import eigenpeft
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import shipped_adapters
from eigenpeft.errors import EigenPeftError
from eigenpeft.linalg.bases.fitting import fit_bases
from eigenpeft.linalg.coefficients import project, reconstruct
from eigenpeft.linalg.factored import frobenius_norm

HERE = Path(__file__).parent
PEERS = ("vlora", "lorashare")


def delta_error(original, other):
    """Relative Frobenius error of one module's update, both given as (lora_B, lora_A)."""
    difference = (
        torch.cat([original[0].double(), -other[0].double()], 1),
        torch.cat([x[1].double() for x in (original, other)]),
    )
    return float(frobenius_norm(*difference) / frobenius_norm(*original))


def mean(values):
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def read(adapters):
    """{(adapter, module): (lora_B, lora_A)} with the scaling folded in."""
    with AdapterCollection.from_pretrained([str(path) for path in adapters]) as collection:
        return {
            (factors.adapter, module): (factors.lora_B, factors.lora_A)
            for module in collection.modules
            for factors in collection.factors(module)
        }


def run_peer(python, peer, k, adapters, truth):
    """What a peer makes of the adapters: bytes, error with the right scaling, error as saved; or its own error."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, HERE / "peers_worker.py", peer, str(k), scratch, *adapters]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"peers_worker.py failed:\n{done.stderr}")
        report = json.loads(done.stdout.splitlines()[-1])
        if report["error"]:
            return report
        written = sorted(path for path in Path(scratch).iterdir() if path.is_dir())
        as_saved = read(written)
        for path in written:  # the factors of the peer, the scaling of the original
            config = (
                next(Path(adapter) for adapter in adapters if Path(adapter).name == path.name) / "adapter_config.json"
            )
            shutil.copy(config, path / "adapter_config.json")
        report["modules_lost"] = len({key[1] for key in truth}) - len({key[1] for key in as_saved})
        # A module that was dropped counts as what it is: an error of 1.
        for name, found in (("as_saved", as_saved), ("error_dW", read(written))):
            report[name] = mean(delta_error(truth[key], found[key]) if key in found else 1.0 for key in truth)
        return report


def run_ours(k, truth, method):
    """The same for eigenpeft, in memory; K is cut to the rank of a module where that is smaller."""
    modules, errors, n_bytes = {}, [], 0
    for (_, module), pair in truth.items():
        modules.setdefault(module, []).append(pair)
    for pairs in modules.values():
        rank = min(sum(len(lora_A) for _, lora_A in pairs), pairs[0][1].shape[1], pairs[0][0].shape[0])
        fitted = fit_bases(pairs, n_components=min(k, rank), method=method)
        bases = {"components_out": fitted.components_out, "components_in": fitted.components_in}
        n_bytes += 4 * (fitted.components_in.numel() + fitted.components_out.numel())
        for pair in pairs:
            coefficients = project(*pair, **bases)
            n_bytes += 4 * sum(part.numel() for part in coefficients)
            errors.append(delta_error(pair, reconstruct(*coefficients, **bases)))
    return {"K": k, "bytes": n_bytes, "error_dW": mean(errors)}


def at_bytes(limit, truth, method):
    """eigenpeft with as many components as `limit` bytes hold."""
    low, high = 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        needed = 0
        for _, module in dict.fromkeys((None, key[1]) for key in truth):
            pairs = [pair for key, pair in truth.items() if key[1] == module]
            n_rows = sum(len(lora_A) for _, lora_A in pairs)
            k = min(middle, n_rows, pairs[0][1].shape[1], pairs[0][0].shape[0])
            needed += 4 * k * (pairs[0][1].shape[1] + pairs[0][0].shape[0] + 2 * n_rows)
        low, high = (middle, high) if needed <= limit else (low, middle - 1)
        most = max(sum(len(pair[1]) for key, pair in truth.items() if key[1] == module) for _, module in truth)
        if low >= most:
            return run_ours(most, truth, method)
    return run_ours(low, truth, method) if low else {"K": 0, "bytes": 0, "error_dW": 1.0}


def write(folder, factors, **config):
    """One PEFT LoRA adapter of {module: (lora_B, lora_A)}."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "synthetic/base", "task_type": "CAUSAL_LM"}
    rank = len(next(iter(factors.values()))[1])
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": sorted({name.split(".")[-1] for name in factors})}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": tensor.float().contiguous()
        for module, pair in factors.items()
        for letter, tensor in zip("BA", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def synthetic(folder, n_adapters, *, rank=8, width=512, ranks=None, alphas=None, skip=(), seed=0):
    """Adapters as training leaves them: lora_B small from zero, lora_A its own random start plus shared directions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    shared = {
        module: [torch.linalg.qr(noise(width, 96))[0].mT * (10 ** (-torch.arange(96) / 48.0))[:, None] for _ in "io"]
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    }
    adapters = []
    for i in range(n_adapters):
        r = ranks[i % len(ranks)] if ranks else rank
        factors = {
            module: (
                0.1 * (noise(r, 96) @ rows_out).mT + 0.002 * noise(width, r),
                noise(r, 96) @ rows_in + 0.02 * noise(r, width),
            )
            for module, (rows_in, rows_out) in shared.items()
            if (i, module.split(".")[-1]) not in skip
        }
        config = {"lora_alpha": alphas[i % len(alphas)]} if alphas else {}
        adapters.append(write(folder / f"adapter-{i:03}", factors, **config))
    return adapters


def regauged(folder, adapters):
    """The same updates in other factors: each (B, A) becomes (B G⁻¹, G A) with cond(G) = 30."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for adapter in adapters:
        factors = {}
        for (_, module), (lora_B, lora_A) in read([adapter]).items():
            rank = len(lora_A)
            left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=generator).double())[0] for _ in "lr")
            scales = torch.logspace(0, 1.4771, rank, dtype=torch.float64)
            factors[module] = (
                lora_B.double() @ ((right.mT / scales) @ left.mT),
                ((left * scales) @ right) @ lora_A.double(),
            )
        made.append(write(folder / adapter.name, factors))
    return made


def compare(name, adapters, python, *, peer_ks):
    """One collection of equal ranks: every peer at several K, eigenpeft at the same K and at the same bytes."""
    truth, rows = read(adapters), []
    plain = sum(4 * (lora_B.numel() + lora_A.numel()) for lora_B, lora_A in truth.values())
    for peer in PEERS:
        for k in peer_ks[peer]:
            row = {"collection": name, "peer": peer, "K": k, **run_peer(python, peer, k, adapters, truth)}
            row["share_of_plain_lora_bytes"] = row["bytes"] / plain
            row["ours_same_K"] = run_ours(k, truth, "balanced")
            for method in ("balanced", "hooi"):
                row[f"ours_same_bytes_{method}"] = at_bytes(row["bytes"], truth, method)
            rows.append(row)
            print(
                f"{name:18} {peer:10} K={k:<3} {row['bytes'] / 1e6:7.3f} MB  error {row['error_dW']:.4f}"
                f" (as saved {row['as_saved']:.4f}) | ours at K {row['ours_same_K']['error_dW']:.4f}"
                f" in {row['ours_same_K']['bytes'] / 1e6:.3f} MB; at the bytes (K={row['ours_same_bytes_balanced']['K']})"
                f" balanced {row['ours_same_bytes_balanced']['error_dW']:.4f}"
                f" hooi {row['ours_same_bytes_hooi']['error_dW']:.4f}",
                flush=True,
            )
    return rows


def demonstrate(name, adapters, python, *, k, vlora_k):
    """One kind of input that the peers refuse or get wrong, and what eigenpeft makes of it."""
    truth = read(adapters)
    case = {"case": name, "K": k, "vlora_K": vlora_k}
    for peer in PEERS:
        found = run_peer(python, peer, k if peer == "lorashare" else vlora_k, adapters, truth)
        keys = ("error", "error_dW", "as_saved", "modules_lost", "warnings")
        case[peer] = {key: found.get(key) for key in keys if found.get(key)}
    try:
        case["eigenpeft"] = run_ours(k, truth, "balanced")
    except EigenPeftError as error:  # not expected: told all the same
        case["eigenpeft"] = {"error": str(error)}
    print(f"{name}:", *(f"{who} {case[who]}" for who in (*PEERS, "eigenpeft")), sep="\n  ", flush=True)
    return case


def told(answer):
    """One cell of the table of demonstrations."""
    if answer.get("error"):
        return f"refuses: {answer['error'].split(': ', 1)[-1].split('. ')[0][:90]}"
    saved = answer.get("as_saved", answer["error_dW"])
    lost = f", {answer['modules_lost']} modules dropped" if answer.get("modules_lost") else ""
    return f"error of what it saves {saved:.4f}{lost}"


def markdown(record):
    """The two tables."""
    lines = [
        "Mean relative error of ΔW over all adapters and modules (lower is better). Storage: all float32 tensors needed to",
        "rebuild every adapter. vlora's factors get their own `lora_alpha` back by hand here (see below). eigenpeft at the",
        "largest K that fits into the peer's bytes: `balanced` is its default, `hooi` its method of least error. At 100 % of the",
        "adapters' own size nothing is compressed: the plain files are exact. The record holds the seconds and all messages.",
        "",
        "| collection | peer | K | MB (of the adapters' own size) | peer's error | eigenpeft, same K (MB) | same bytes (K) "
        "| same bytes, hooi |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        same, held, hooi = row["ours_same_K"], row["ours_same_bytes_balanced"], row["ours_same_bytes_hooi"]
        lines.append(
            f"| {row['collection']} | {row['peer']} | {row['K']} "
            f"| {row['bytes'] / 1e6:.3f} ({row['share_of_plain_lora_bytes']:.0%}) | {row['error_dW']:.4f} "
            f"| {same['error_dW']:.4f} ({same['bytes'] / 1e6:.3f}) | {held['error_dW']:.4f} ({held['K']}) "
            f"| {hooi['error_dW']:.4f} |"
        )
    lines += [
        "",
        "What each package writes back for inputs that are not alike. K is that of lorashare and eigenpeft; vlora has as many of",
        "its own components as make it exact (11, or 9 of 10), or 4 where K = 32.",
        "",
    ]
    lines += ["| input | vlora-dev | lorashare | eigenpeft |", "|---|---|---|---|"]
    for case in record["demonstrations"]:
        lines.append(f"| {case['case']} | " + " | ".join(told(case[who]) for who in (*PEERS, "eigenpeft")) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="python of an environment with vlora-dev and lorashare")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    python = arguments.peers_python
    versions = subprocess.run(
        [
            python,
            "-c",
            "import importlib.metadata as m; print(*(m.version(n) for n in ('vlora-dev', 'lorashare', 'torch')))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    gpt2 = sorted(path.parent for path in (HERE.parent / "tests/data/gpt2_adapters").glob("*/adapter_config.json"))
    minilm = sorted(path.parent for path in shipped_adapters().glob("*/adapter_config.json"))
    record = {"rows": [], "demonstrations": []}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        many = synthetic(place / "many", 100)
        for name, adapters, peer_ks in (
            ("GPT-2, 3 real", gpt2, {"vlora": (1, 2), "lorashare": (2, 4, 8, 16, 24)}),
            ("MiniLM, 10 real", minilm, {"vlora": (1, 2, 4, 8), "lorashare": (4, 8, 16, 32, 64)}),
            ("synthetic, 100", many, {"vlora": (1, 4, 8, 32), "lorashare": (4, 8, 16, 32, 64)}),
        ):
            record["rows"] += compare(name, adapters, python, peer_ks=peer_ks)
        for name, adapters, k, vlora_k in (
            ("lora_alpha = 2 r, 10 real MiniLM, enough K to be exact", minilm, 80, 9),
            ("alphas 8, 16, 64 in turn", synthetic(place / "alphas", 12, alphas=(8, 16, 64)), 96, 11),
            ("ranks 4 and 8", synthetic(place / "ranks", 12, ranks=(4, 8)), 72, 11),
            (
                "one adapter without v_proj",
                synthetic(place / "missing", 12, skip={(3, "v_proj")}),
                96,
                11,
            ),
            ("12 adapters, K = 32", many[:12], 32, 4),
            ("the same updates re-gauged, K = 32", regauged(place / "gauge", many[:12]), 32, 4),
        ):
            record["demonstrations"].append(demonstrate(name, adapters, python, k=k, vlora_k=vlora_k))
    record["environment"] = {
        "eigenpeft": eigenpeft.__version__,
        **dict(zip(("vlora-dev", "lorashare", "torch of the peers"), versions, strict=True)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "peers.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
