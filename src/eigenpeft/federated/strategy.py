"""`AdapterFedAvg`: Flower's FedAvg for adapters, averaged by any rule, bad clients left out by name, resumed from a round."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid  # pyright: ignore[reportMissingImports]
from flwr.serverapp.strategy import FedAvg, Result  # pyright: ignore[reportMissingImports]
from torch import Tensor

from eigenpeft.combining.federation.averaging import average, find_averaging_rule
from eigenpeft.combining.federation.round_files import Rounds, read_rounds, save_rounds
from eigenpeft.errors import AdapterConfigError
from eigenpeft.federated.messages import EXAMPLES, RULE, SCALING, read_replies, to_record

logger = logging.getLogger(__name__)


class AdapterFedAvg(FedAvg):
    """Federated averaging of LoRA adapters of mixed rank, and of EigenLoRA's cores in one frozen subspace.

    Sampling, transport, secure aggregation and privacy are Flower's. A client that drops out, or whose answer has another
    base, other modules, other shapes or NaN, is named once per round in the log and in `rounds`, and the round goes on without
    it.

    Args:
        rule: "exact" (FLoRA's mean of the updates, truncated to the server's rank by one SVD), "fedex" (mean of the factors,
            the rest goes into the base weights), "fedsa" (A shared, B and head stay local), "ffa" (A frozen), "fedit" (the
            mean of the factors, for comparison), "seeds" (seeds and lengths of zeroth-order steps, no tensors), or a rule of
            `eigenpeft.merge`. Cores "full" and "diagonal" are averaged exactly by every one of them.
        rank: Rank of the averaged adapter; None keeps that of the initial arrays.
        scaling: `lora_alpha / r` of the adapter that the initial arrays are of.
        base: What clients must have trained on: the base model's name, or the fingerprint of the subspace.
        out_dir: Where the state is written after each round; a start that finds one there goes on from it. None writes nothing.
        options: Options of a merging rule, such as `{"density": 0.3}`.
        **fedavg: As for Flower's `FedAvg`: `fraction_train`, `min_train_nodes`, ...

    Raises:
        AdapterConfigError: If there is no such rule, or `scaling` is not above 0.

    Attributes:
        rounds: One record per finished round: clients used and left out, bytes each way, what the truncation lost.

    Examples:
        >>> strategy = AdapterFedAvg(rule="exact", scaling=2.0, out_dir="federation")
        >>> strategy.settings["rule"]
        'exact'
        >>> strategy.start(grid, initial_arrays=to_record(tensors), num_rounds=10)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        rule: str = "exact",
        rank: int | None = None,
        scaling: float = 1.0,
        base: str | None = None,
        out_dir: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        **fedavg: Any,
    ):
        find_averaging_rule(rule)
        if not scaling > 0:
            raise AdapterConfigError(
                f"scaling={scaling} must be above 0: it is lora_alpha / r of the server's adapter."
            )
        super().__init__(weighted_by_key=EXAMPLES, **fedavg)
        self.rule, self.rank, self.scaling, self.base = rule, rank, float(scaling), base
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.options = dict(options or {})
        self.rounds: list[dict[str, Any]] = []
        self._expected: Mapping[str, Tensor] = {}
        self._n_asked = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a federation must be started with again to go on."""
        return {
            "rule": self.rule,
            "rank": self.rank,
            "scaling": self.scaling,
            "base": self.base,
            "options": self.options,
        }

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left of `num_rounds`; with `out_dir`, those that a stopped run finished are not repeated.

        Args:
            grid: Flower's.
            initial_arrays: What the first round starts from; a resumed run takes what was saved.
            num_rounds: Rounds in all.
            timeout: Seconds to wait for the clients of a round.
            train_config: Sent to clients, with the rule and the scaling.
            evaluate_config: As for `FedAvg`.
            evaluate_fn: As for `FedAvg`; round numbers go on where the stopped run ended.

        Raises:
            ArtifactError: If the folder holds a federation with other settings, or is damaged.
        """
        before = None if self.out_dir is None else read_rounds(self.out_dir, settings=self.settings)
        if before is not None:
            initial_arrays = to_record(before.tensors)
            self.rounds = [dict(each) for each in before.rounds]
            logger.info("%d of %d rounds were finished before", len(self.rounds), num_rounds)
        done = len(self.rounds)
        result = super().start(
            grid,
            initial_arrays,
            num_rounds=max(0, num_rounds - done),
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=None if evaluate_fn is None else lambda number, arrays: evaluate_fn(number + done, arrays),
        )
        if not result.arrays:
            result.arrays = initial_arrays
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the averaged adapter with the rule and the scaling; as `FedAvg` does otherwise.

        Args:
            server_round: Number of the round in this run.
            arrays: The server's tensors.
            config: Settings that are sent to the clients.
            grid: Flower's.
        """
        self._expected = arrays.to_torch_state_dict()
        config[RULE], config[SCALING] = self.rule, self.scaling
        messages = list(super().configure_train(len(self.rounds) + 1, arrays, config, grid))
        self._n_asked = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the round, name who is left out, and write the state.

        Args:
            server_round: Number of the round in this run.
            replies: Replies of the clients.

        Raises:
            ArtifactError: If the state of the round cannot be written.
            AdapterConfigError: If the rule cannot average what was sent. Where nothing usable came, the state stays as it is.
        """
        updates, contents, left_out = read_replies(replies)
        updates.sort(key=lambda update: update.name)  # sums of floats depend on the order, and answers come in any
        averaged = average(
            updates,
            expected=self._expected,
            rule=self.rule,
            rank=self.rank,
            scaling=self.scaling,
            base=self.base,
            **self.options,
        )
        left_out |= averaged.left_out
        sent = sum(tensor.numel() * tensor.element_size() for tensor in self._expected.values())
        number = len(self.rounds) + 1
        lost = max(averaged.relative_errors.values(), default=0.0)
        n_silent = self._n_asked - len(averaged.used) - len(left_out)
        if left_out or n_silent > 0:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            silent = f"{n_silent} did not answer in time" if n_silent > 0 else ""
            logger.warning(
                "Round %d goes on with %d of %d clients, without %s. Mend what is named there; the next round asks again.",
                number,
                len(averaged.used),
                self._n_asked,
                "; ".join(filter(None, (reasons, silent))),
            )
        record = {
            "round": number,
            "clients": dict(averaged.used),
            "left_out": left_out,
            "n_silent": max(0, n_silent),
            "bytes_to_clients": sent * self._n_asked,
            "bytes_from_clients": averaged.bytes_received,
            "largest_share_lost": lost,
        }
        self.rounds.append(record)
        if self.out_dir is not None:
            save_rounds(Rounds(averaged.tensors, tuple(self.rounds), self.settings), self.out_dir)
        if not averaged.used:
            return None, None
        used = [contents[name] for name in averaged.used]
        metrics = self.train_metrics_aggr_fn(used, EXAMPLES)
        for key in ("bytes_to_clients", "bytes_from_clients", "largest_share_lost"):
            metrics[f"adapter-{key.replace('_', '-')}"] = record[key]
        metrics["adapter-clients-used"], metrics["adapter-clients-left-out"] = len(used), len(left_out)
        return to_record(averaged.tensors), metrics
