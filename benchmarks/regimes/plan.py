"""What the study runs, in order of value: slices of methods, targets, zoos, sizes, rows and seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from customers import ZOOS, Customer

STEPS, TUNING_ROWS, TUNING_SEEDS = 40, 64, (100,)
PRIMARY = ("head", "EigenLoRA K8", "LoRA equal", "LoRA r8", "random K8", "merged, head")
ON_TOP = ("merged, LoRA r8", "merged, EigenLoRA K8")
OTHERS = (
    "diagonal K32",
    "INIT r8",
    "nearest continued",
    "mixture",
    "LoRA r1",
    "full K8",
    "EigenLoRA K32",
    "random K32",
)
COMPOSED = ("mixture, shared", "mixture", "random mixture", "INIT r8", "nearest, head", "nearest continued", "LoraHub")
TUNED_OTHERS = tuple(name for name in OTHERS if name not in ("INIT r8", "nearest continued", "full K8"))


@dataclass(frozen=True)
class Slice:
    """Every one of these methods on every one of these targets.

    Attributes:
        name: On the command line.
        methods: Names.
        relatives: Only targets with relatives in one of these zoos.
        zoo: "own" (the target's relatives), "other" (the other zoo of the same data set), "far" (the first zoo of the other
            data set), "shipped" or "mixed".
        size: Adapters of the zoo.
        rows: Training rows.
        seeds: Of the rows, the head, the batches and the adapter.
        draws: Whether the seed also draws which adapters are in the zoo.
        stage: "tune" or "test".
    """

    name: str
    methods: tuple[str, ...]
    relatives: tuple[str, ...] = ZOOS
    zoo: str = "own"
    size: int = 20
    rows: int = 64
    seeds: tuple[int, ...] = (0,)
    draws: bool = False
    stage: str = "test"

    def targets(self, customers: Mapping[str, Customer]) -> list[str]:
        found = [c for c in customers.values() if c.name.startswith("tune_") == (self.stage == "tune")]
        return [c.name for c in found if c.relatives in self.relatives]

    def zoo_of(self, customer: Customer) -> str:
        own = customer.relatives
        if self.zoo == "own":
            return own
        if self.zoo == "other":
            return own[:-1] + {"a": "b", "b": "a"}[own[-1]]
        if self.zoo == "far":
            return {"bank": "clinc_a", "clinc": "bank_a"}[own[:-2]]
        return self.zoo

    def zoos(self, customers: Mapping[str, Customer]) -> Iterable[tuple[str, int]]:
        return dict.fromkeys((self.zoo_of(customers[name]), self.size) for name in self.targets(customers))


CHEAP = ("EigenLoRA K8", "merged, head")
BANK, FIRST, LAST = ("bank_a", "bank_b"), ("clinc_a",), ("clinc_b",)
PLAN = (
    Slice("tune", ("head", "EigenLoRA K8", "LoRA r8", "random K8", "LoRA equal"), BANK, stage="tune"),
    # The two primary cells: zoo of 20, 64 rows, related targets.
    Slice("primary", PRIMARY, FIRST),
    # Fewer relatives; none: the other data set, the ten unrelated tasks.
    Slice("growth-5", CHEAP, FIRST, size=5),
    Slice("far", CHEAP, FIRST, zoo="far"),
    Slice("shipped", CHEAP, FIRST, zoo="shipped", size=10),
    Slice("growth-10", CHEAP, FIRST, size=10),
    Slice("primary", PRIMARY, BANK),
    Slice("on-top", ON_TOP, FIRST),
    Slice("far", CHEAP, BANK, zoo="far"),
    Slice("growth-5", CHEAP, BANK, size=5),
    Slice("shipped", CHEAP, BANK, zoo="shipped", size=10),
    Slice("primary", PRIMARY, LAST),
    Slice("unrelated", CHEAP, FIRST + LAST, zoo="other"),
    Slice("growth-10", CHEAP, BANK + LAST, size=10),
    Slice("growth-5", CHEAP, LAST, size=5),
    Slice("shipped", CHEAP, LAST, zoo="shipped", size=10),
    Slice("growth-40", CHEAP, FIRST + LAST, size=40),
    Slice("unrelated-5", CHEAP, FIRST + LAST, zoo="other", size=5),
    Slice("unrelated-40", CHEAP, FIRST + LAST, zoo="other", size=40),
    Slice("on-top", ON_TOP, BANK + LAST),
    Slice("mixed", CHEAP, zoo="mixed"),
    Slice("rows-16", (*PRIMARY, *ON_TOP), rows=16),
    Slice("tune-others", TUNED_OTHERS, BANK, stage="tune"),
    Slice("others", OTHERS),
    Slice("primary-again", (*PRIMARY, *ON_TOP), seeds=(1,)),
    Slice("growth-40", CHEAP, BANK, size=40),
    Slice("rows-256", (*PRIMARY, *ON_TOP), rows=256),
    Slice("unrelated-again", CHEAP, FIRST + LAST, zoo="other", seeds=(1,)),
    Slice("growth-5-again", CHEAP, size=5, seeds=(1, 2), draws=True),
    Slice("growth-10-again", CHEAP, size=10, seeds=(1, 2), draws=True),
    Slice("tune-composed", ("mixture", "mixture, shared", "LoRA r1"), BANK, stage="tune"),
    Slice("composed", (*COMPOSED, "LoRA r1"), BANK),
    Slice("composed", (*COMPOSED, "LoRA r1"), FIRST),
    Slice("primary-third", (*PRIMARY, *ON_TOP), seeds=(2,)),
)
