"""Does `recycle` choose well on a language model? The customers of the study of regimes as generation, beside fixed strategies.

Command:   python benchmarks/recycling_smollm2.py --model MODEL --data DIR --work WORK [--seeds 0 1 2]
           python benchmarks/recycling_smollm2.py --report [--work WORK]
           (MODEL is `smollm2/model` as `make smollm2` writes it; DIR of data holds clinc150/, JSONL)
Hardware:  CPU, one thread, float32; 25 s per adapter of a zoo, and five minutes per target and seed.
Writes:    WORK/zoos, as regimes/language.py has them, and WORK/recycling_smollm2.jsonl (a line per target, seed and strategy);
           started again, it goes on where it stopped. --report prints the tables and copies the lines to
           benchmarks/results/recycling_smollm2.jsonl.

SmolLM2-135M-Instruct writes a customer's intent; a test row is right if every token is. Rows, adapters, steps and the place of the
LoRAs are those of regimes/language.py. Related: ten adapters, two of the target's own domain. Unrelated: ten adapters of five
other domains. `recycle` has its defaults; every fixed strategy is one candidate of it, trained on all 64 rows for 30 steps by the
same code, at the first learning rate that `recycle` has for it; merged starts take λ = 1. Which candidates a language model's
search begins with was settled on the two tuning customers of banking77, which are no targets.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "regimes"), str(HERE / "study")]

import language  # noqa: E402
import recycling_cells as cells  # noqa: E402
import torch  # noqa: E402
import zoos  # noqa: E402
from causal import judge  # noqa: E402
from causal_tasks import Row, pack  # noqa: E402
from recycling_cells import RandomDirections, RandomMean, Strategy  # noqa: E402
from run import quiet  # noqa: E402

from eigenpeft.recycling.candidates import LANGUAGE, learning_rates_of  # noqa: E402

RESULTS = HERE / "results" / "recycling_smollm2.jsonl"
CHOSEN = ("merged_lora_r8", "init", "eigenlora", "merged_eigenlora", "same_parameters", "random_subspace")
RATES = {name: rates[0] for name, rates in learning_rates_of(("lora_r8", *CHOSEN), task_type=LANGUAGE).items()}
STRATEGIES = {
    "lora_r8": Strategy("lora_r8", RATES["lora_r8"], uses_adapters=False),
    **{name: Strategy(name, RATES[name]) for name in CHOSEN},
    # A fresh LoRA at the next higher rate, so that it is not judged at one rate alone.
    "lora_r8 at 0.03": Strategy("lora_r8", 3e-2, uses_adapters=False),
    # The controls of the merged start and of INIT.
    "lora_r8 on a random update of that norm": Strategy("merged_lora_r8", RATES["merged_lora_r8"], RandomMean),
    "init at random directions": Strategy("init", RATES["init"], RandomDirections),
}


class Target(cells.Target):
    """A customer as generation, by the model's upper layers."""

    task_type, steps, batch_size = LANGUAGE, language.STEPS, language.BATCH_SIZE

    def __init__(self, slice_: language.Slice, name: str, *, seed: int):
        self.task, self.halves, self.relatives = (
            slice_.task(name, seed),
            slice_.halves,
            slice_.customers[name].relatives,
        )
        rows = [{"tokens": row.tokens, "n_prompt": row.n_prompt, "hidden": row.hidden} for row in self.task.train]
        super().__init__(name, seed=seed, rows=rows, collator=packed)

    def base(self):
        return self.halves.upper()

    def measured(self, model) -> dict[str, float]:
        loss, exact = judge(model, self.task)
        return {"accuracy": exact, "loss": loss}


def packed(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Rows one behind the other; only the answers' tokens get logits, beside which their labels stand already."""
    batch = pack([Row(**row) for row in rows])
    return {
        "inputs_embeds": batch.hidden,
        "position_ids": batch.positions,
        "logits_to_keep": batch.before_answer,
        "labels": batch.answer[None],
        "shift_labels": batch.answer[None],
    }


@lru_cache(maxsize=2)
def zoo(kind: str, relatives: str, slice_: language.Slice):
    """The ten adapters of the target's domains, or of the five others, trained where they are not there yet."""
    name = relatives if kind == "related" else relatives[:-1] + {"a": "b", "b": "a"}[relatives[-1]]
    wanted = language.Zoo(name, language.SIZE, slice_.work)
    slice_.train_zoo(wanted)
    return zoos.collection(*wanted.part)


def main() -> None:
    parser = cells.options(__doc__, STRATEGIES)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--targets", nargs="*", help="default: the ten of clinc150")
    given = parser.parse_args()
    if given.report:
        cells.publish(given.work, RESULTS)
        return
    if given.model is None or given.data is None or given.work is None:
        parser.error("--model, --data and --work are needed to run cells; --report needs none of them")
    torch.set_num_threads(1)
    quiet()
    slice_ = language.Slice(model=given.model, data=given.data, work=given.work)
    chosen = given.targets or [each.name for each in slice_.customers.values() if each.source == "clinc150"]
    cells.fill(
        given.work / RESULTS.name,
        (Target(slice_, name, seed=seed) for seed in given.seeds for name in chosen),
        names=given.strategies,
        strategies=STRATEGIES,
        kinds=given.zoos,
        zoo=lambda kind, target: zoo(kind, target.relatives, slice_),
    )


if __name__ == "__main__":
    main()
