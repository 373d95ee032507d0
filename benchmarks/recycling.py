"""Does `recycle` choose well? New customers, 64 rows each, with related and with unrelated adapters, beside fixed strategies.

Command:   python benchmarks/recycling.py --data DIR --work DIR [--source clinc150 banking77] [--seeds 0 1 2]
           python benchmarks/recycling.py --report [--work DIR]
           (DIR of data holds clinc150/ and banking77/, JSONL)
Hardware:  CPU, one thread; about 10 CPU seconds per adapter of the two zoos, and two CPU minutes per target.
Writes:    WORK/zoos, WORK/recycling.jsonl (a line per target and strategy); started again, it goes on where it stopped.
           --report prints the tables and copies the lines to benchmarks/results/recycling.jsonl.

The targets are the ten clinc150 customers of the study of regimes (benchmarks/regimes/customers.py), seven intents of one
domain that no adapter has seen, and its eight of banking77. Related: 20 adapters of the target's zoo, of clinc150's four of
its own domain. Unrelated: the ten adapters
that ship with eigenpeft. `recycle` has its defaults and 40 steps; every fixed strategy is one candidate of `recycle` trained on
all 64 rows for 40 steps by the same code, at the rate that the study chose for it on customers that are no targets; merged
starts take λ = 1. Same rows, seed and head for all strategies of a target. Cost is in optimizer steps, in trainings of 40
steps.
"""

import sys
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "regimes"))

import customers  # noqa: E402
import recycling_cells as cells  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import zoos  # noqa: E402
from recycling_cells import RandomMean, Strategy  # noqa: E402
from run import quiet  # noqa: E402
from transformers import DataCollatorWithPadding  # noqa: E402

RESULTS = HERE / "results" / "recycling.jsonl"
N_ROWS, SIZE = 64, 20
# Rates that the study of regimes chose (docs/regimes.md); the merged LoRA takes that of the LoRA.
STRATEGIES = {
    "lora_r8": Strategy("lora_r8", 3e-3, uses_adapters=False),
    "same_parameters": Strategy("same_parameters", 1e-2),
    "eigenlora": Strategy("eigenlora", 1e-2),
    "random_subspace": Strategy("random_subspace", 1e-2),
    "nearest_continued": Strategy("nearest_continued", 3e-3),
    "merged_lora_r8": Strategy("merged_lora_r8", 3e-3),
    "merged_eigenlora": Strategy("merged_eigenlora", 1e-2),
    # The control of the merged start.
    "lora_r8 on a random update of that norm": Strategy("merged_lora_r8", 3e-3, RandomMean),
}


class Target(cells.Target):
    """A customer as a classifier."""

    task_type, steps, batch_size = "SEQ_CLS", 40, training.BATCH_SIZE

    def __init__(self, customer: customers.Customer, data: Path, *, seed: int):
        parts = customers.rows_of_target(customer, n_rows=N_ROWS, seed=seed, data=data)
        self.task, self.relatives = training.tokenized(*parts), customer.relatives
        labelled = zip(self.task.ids, self.task.labels.tolist(), strict=True)
        rows = [{"input_ids": ids, "labels": label} for ids, label in labelled]
        super().__init__(customer.name, seed=seed, rows=rows, collator=DataCollatorWithPadding(training.tokenizer()))

    def base(self):
        return training.fresh_base(self.task.n_labels, seed=self.seed)

    def measured(self, model) -> dict[str, float]:
        return {"accuracy": training.accuracy(model.eval(), self.task.test_ids, self.task.test_labels)}


@lru_cache(maxsize=2)
def zoo(kind: str, relatives: str, data: Path, work: Path):
    """The shipped adapters, or twenty of the target's data set, trained where they are not there yet."""
    if kind == "unrelated":
        return zoos.collection("shipped", 10, 0, work)
    (work / "zoos").mkdir(parents=True, exist_ok=True)
    for member in zoos.missing_members(relatives, SIZE, data=data, work=work):
        zoos.train_member(member, data=data, folder=work / "zoos" / member.name)
    return zoos.collection(relatives, SIZE, 0, work)


def main() -> None:
    parser = cells.options(__doc__, STRATEGIES)
    parser.add_argument("--source", nargs="*", default=["clinc150"], choices=("clinc150", "banking77"))
    given = parser.parse_args()
    if given.report:
        cells.publish(given.work, RESULTS)
        return
    if given.data is None or given.work is None:
        parser.error("--data and --work are needed to run cells; --report needs neither")
    torch.set_num_threads(1)
    quiet()
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in customers.targets(given.data) if each.source in given.source]
    cells.fill(
        given.work / RESULTS.name,
        (Target(customer, given.data, seed=seed) for seed in given.seeds for customer in chosen),
        names=given.strategies,
        strategies=STRATEGIES,
        kinds=given.zoos,
        zoo=lambda kind, target: zoo(kind, "" if kind == "unrelated" else target.relatives, given.data, given.work),
    )


if __name__ == "__main__":
    main()
