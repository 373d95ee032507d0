"""Customers: small intent tasks cut from banking77 and clinc150, so that some are related and others are not.

A zoo is many customers of one kind; a target is a customer with intents that no adapter of any zoo has seen.

- `bank_a`, `bank_b`: the 77 intents of banking77 in two halves. A member of a zoo has 8 intents of its half; the targets of a zoo
  are four disjoint sets of 8 intents of the *other* half; what is left over there (6 or 7 intents) is for tuning the rates.
- `clinc_a`, `clinc_b`: five domains of clinc150 each. A member has 6 of the 8 "seen" intents of one domain, domains in turn; a
  target has the 7 others of one domain. So every target has relatives in one of these zoos and none in the other.
- `shipped`: the ten unrelated adapters that ship with eigenpeft. `mixed`: a quarter from each of the four above.
"""

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ZOO_SIZE = 40
ZOOS = ("bank_a", "bank_b", "clinc_a", "clinc_b")
_ROWS_OF_A_MEMBER, _TEST_FROM_TRAIN, _MAX_TEST = 60, 15, 320
_BANK_TARGETS, _BANK_INTENTS, _CLINC_SEEN, _CLINC_INTENTS = 4, 8, 8, 6


@dataclass(frozen=True)
class Customer:
    """One small classification task.

    Attributes:
        name: Unique.
        source: "banking77" or "clinc150".
        intents: Its labels, in the order of its classes.
        group: The domain of clinc150 that the intents are of, or "banking".
        relatives: Name of the zoo whose members are its relatives.
    """

    name: str
    source: str
    intents: tuple[str, ...]
    group: str
    relatives: str


@dataclass(frozen=True)
class Rows:
    """Texts with their class numbers."""

    texts: list[str]
    labels: list[int]


@lru_cache(maxsize=4)
def _by_intent(data: Path, source: str, split: str) -> dict[str, list[str]]:
    found = defaultdict(list)
    files = {
        "banking77": {"train": ["train"], "test": ["test"]},
        "clinc150": {"train": ["train"], "test": ["dev", "test"]},
    }
    has_test = (data / source / "test.jsonl").exists()
    for part in files.get(source, {"train": ["train"], "test": ["test" if has_test else "dev"]})[split]:
        with (data / source / f"{part}.jsonl").open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                text = row["text"] if "text" in row else f"{row['text_a']} [SEP] {row['text_b']}"
                found[row.get("label_name", row["label"])].append(text.strip())
    return dict(found)


@lru_cache(maxsize=1)
def _domains(data: Path) -> dict[str, list[str]]:
    found = defaultdict(set)
    with (data / "clinc150" / "train.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found[row["domain"]].add(row["label"])
    return {domain: sorted(found[domain]) for domain in sorted(found)}


def _halves(data: Path) -> dict[str, list[str]]:
    """The intents of banking77 that the members of a zoo may have."""
    intents = sorted(_by_intent(data, "banking77", "train"))
    random.Random("banking77").shuffle(intents)
    return {"bank_a": intents[:38], "bank_b": intents[38:]}


def _split_domains(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Zoo to its domains; domain to its intents, the seen ones first."""
    domains = _domains(data)
    names = list(domains)
    random.Random("clinc150").shuffle(names)
    for domain in names:
        random.Random(domain).shuffle(domains[domain])
    return {"clinc_a": names[:5], "clinc_b": names[5:]}, domains


def members(zoo: str, data: Path) -> list[Customer]:
    """The customers that a zoo's adapters are trained on; the first n are the zoo of n."""
    if zoo.startswith("bank"):
        intents = _halves(data)[zoo]
        draws = [random.Random(f"{zoo}/{i}").sample(intents, _BANK_INTENTS) for i in range(ZOO_SIZE)]
        return [Customer(f"{zoo}_{i:02}", "banking77", tuple(d), "banking", zoo) for i, d in enumerate(draws)]
    of_zoo, domains = _split_domains(data)
    found = []
    for i in range(ZOO_SIZE):
        domain = of_zoo[zoo][i % 5]
        intents = random.Random(f"{zoo}/{i}").sample(domains[domain][:_CLINC_SEEN], _CLINC_INTENTS)
        found.append(Customer(f"{zoo}_{i:02}", "clinc150", tuple(intents), domain, zoo))
    return found


def targets(data: Path) -> list[Customer]:
    """All targets, those of the two data sets in turn."""
    halves = _halves(data)
    bank = []
    for zoo, other in (("bank_a", "bank_b"), ("bank_b", "bank_a")):
        for i in range(_BANK_TARGETS):
            own = halves[other][i * _BANK_INTENTS : (i + 1) * _BANK_INTENTS]
            bank.append(Customer(f"new_{zoo}_{i}", "banking77", tuple(own), "banking", zoo))
    of_zoo, domains = _split_domains(data)
    clinc = [
        Customer(f"new_{domain}", "clinc150", tuple(domains[domain][_CLINC_SEEN:]), domain, zoo)
        for zoo, names in of_zoo.items()
        for domain in names
    ]
    return bank + clinc


def tuning_customers(data: Path) -> list[Customer]:
    """Two customers that are never targets, each with relatives in a zoo."""
    halves = _halves(data)
    used = _BANK_TARGETS * _BANK_INTENTS
    return [
        Customer(f"tune_{zoo}", "banking77", tuple(halves[other][used:]), "banking", zoo)
        for zoo, other in (("bank_a", "bank_b"), ("bank_b", "bank_a"))
    ]


def _pools(customer: Customer, data: Path) -> tuple[list[list[str]], Rows]:
    """Training texts of every intent, and the test rows, which are the same for every seed."""
    train, test = (_by_intent(data, customer.source, split) for split in ("train", "test"))
    pools, held_out = [], []
    for label, intent in enumerate(customer.intents):
        texts = sorted(train[intent])
        random.Random(intent).shuffle(texts)
        reserved = _TEST_FROM_TRAIN if customer.source == "banking77" and len(texts) >= 45 else 0
        pools.append(texts[reserved:])
        held_out += [(text, label) for text in (*test[intent], *texts[:reserved])]
    random.Random(customer.name).shuffle(held_out)
    held_out = held_out[:_MAX_TEST]
    return pools, Rows([text for text, _ in held_out], [label for _, label in held_out])


def rows_of_target(customer: Customer, *, n_rows: int, seed: int, data: Path) -> tuple[Rows, Rows]:
    """`n_rows` training rows, as many of each intent as can be, drawn by seed; and the test rows."""
    pools, test = _pools(customer, data)
    generator = random.Random(f"{customer.name}/{seed}")
    drawn = [generator.sample(pool, len(pool)) for pool in pools]
    rows = [(pool[i], label) for i in range(max(map(len, drawn))) for label, pool in enumerate(drawn) if i < len(pool)]
    rows = rows[:n_rows]
    return Rows([text for text, _ in rows], [label for _, label in rows]), test


def rows_of_member(customer: Customer, data: Path, *, per_intent: int = _ROWS_OF_A_MEMBER) -> tuple[Rows, Rows]:
    """The training rows of an adapter of a zoo, 60 an intent where there are as many, and its test rows."""
    pools, test = _pools(customer, data)
    rows = [(text, label) for label, pool in enumerate(pools) for text in pool[:per_intent]]
    return Rows([text for text, _ in rows], [label for _, label in rows]), test
