"""Rounds without tensors: clients send the seeds and lengths of their zeroth-order steps, and all rebuild the same weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.combining.federation.updates import FREE_LENGTH, ClientUpdate
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.zeroth_order import projected_gradient, replay

SEEDS, STEPS, COUNT = f"{FREE_LENGTH}seeds", f"{FREE_LENGTH}steps", f"{FREE_LENGTH}count"
"""Keys of what travels: a seed and a length per step, and the number of trained values."""
_START = "_eigenpeft_values_before_rounds"


def no_steps(model: nn.Module) -> dict[str, Tensor]:
    """What the first round starts from under `rule="seeds"`: no step yet.

    Args:
        model: The server's, at the start that all clients have: the same base, adapter and seed.

    Raises:
        AdapterConfigError: If it has no trained values.

    Examples:
        >>> len(no_steps(torch.nn.Linear(3, 2)))
        3
    """
    return _steps(model, [], [])


def train_steps(
    model: nn.Module,
    *,
    batches: Iterable[Mapping[str, Any]],
    learning_rate: float,
    epsilon: float = 1e-3,
    seed: int = 0,
    pool: int | None = 4096,
    objective: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
) -> dict[str, Tensor]:
    """Train a client's values by forward passes alone, one step per batch, and return what it sends.

    Each step draws a seed, looks along its direction z (`projected_gradient`: `g = (L(θ + ε z) - L(θ - ε z)) / 2ε`) and
    moves by `-η g z`: FedKSeed (arXiv 2312.06353) on MeZO's steps (arXiv 2305.17333, algorithm 1). Dropout is off
    meanwhile.

    Args:
        model: The client's model, at the server's values (`load_round`); its trained values are moved.
        batches: Batches of its rows; the model is called as `model(**batch).loss`.
        learning_rate: η.
        epsilon: ε of the two passes.
        seed: From which the steps' seeds are drawn; another one per client and round.
        pool: Draw them from so many, so that the list of all rounds never gets longer (FedKSeed has 4,096); None for any.
        objective: As for `ZerothOrderTrainer`; None takes the model's loss.

    Returns:
        Seeds (steps,) int64 and `η g` (steps,) float32, 12 bytes per step, and the number of trained values (1,).

    Raises:
        AdapterConfigError: If an argument is out of range, the model has no trained values, or the objective is not finite.

    Examples:
        >>> model = torch.nn.Linear(1, 1)
        >>> batches = [{"x": torch.ones(4, 1)}] * 3
        >>> sent = train_steps(
        ...     model,
        ...     batches=batches,
        ...     learning_rate=0.1,
        ...     objective=lambda model, batch: model(batch["x"]).square().mean(),
        ... )
        >>> sorted(tensor.numel() for tensor in sent.values())  # the number of values, three seeds, three steps
        [1, 3, 3]
    """
    if not (learning_rate > 0 and epsilon > 0 and (pool is None or pool >= 1)):
        raise AdapterConfigError(
            f"learning_rate={learning_rate} and epsilon={epsilon} must be above 0, and pool={pool} at least 1 or None."
        )
    parameters = _trained(model)
    was_training = model.training
    generator = torch.Generator().manual_seed(seed)
    seeds, steps = [], []
    model.eval()
    try:
        for batch in batches:
            drawn = int(torch.randint(pool or 2**62, (1,), generator=generator))
            values = [parameter.detach().clone() for parameter in parameters]

            def score(moved: Sequence[Tensor], batch: Mapping[str, Any] = batch) -> float:
                _set(parameters, moved)
                with torch.no_grad():
                    found = model(**batch).loss if objective is None else objective(model, batch)
                return float(torch.as_tensor(found, dtype=torch.float64).mean())

            slope, loss = projected_gradient(score, values, epsilon=epsilon, seed=drawn)
            step = float(torch.tensor(learning_rate * slope, dtype=torch.float32))  # the value that is sent
            if not abs(step) < float("inf"):
                _set(parameters, values)
                raise AdapterConfigError(
                    f"The objective is {loss} at step {len(steps)}, and no direction can be told from it; lower the learning rate "
                    "or epsilon."
                )
            _set(parameters, replay(values, [drawn], [step]))
            seeds.append(drawn)
            steps.append(step)
    finally:
        model.train(was_training)
    return _steps(model, seeds, steps)


def add_steps(
    before: Mapping[str, Tensor], used: Sequence[ClientUpdate], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The list of all rounds after one more: every client's steps times its weight, a seed that came before added to.

    The values that it leads to are the weighted mean of the values that the clients have, number by number.

    Args:
        before: The server's list.
        used: Updates with steps.
        weights: p_i.
    """
    total = dict(zip(before[SEEDS].tolist(), before[STEPS].tolist(), strict=True))
    for update, weight in zip(used, weights, strict=True):
        for seed, step in zip(update.tensors[SEEDS].tolist(), update.tensors[STEPS].tolist(), strict=True):
            total[seed] = total.get(seed, 0.0) + weight * step
    steps = torch.tensor(list(total.values()), dtype=torch.float32)
    return {SEEDS: torch.tensor(list(total), dtype=torch.int64), STEPS: steps, COUNT: before[COUNT]}


def odd_steps(update: ClientUpdate, expected: Mapping[str, Tensor]) -> str | None:
    """Why steps cannot be used, beyond what `keep_usable` looks at.

    Args:
        update: Update of a client.
        expected: The server's list.
    """
    seeds, steps, count = (update.tensors[key] for key in (SEEDS, STEPS, COUNT))
    if len(seeds) != len(steps):
        return f"it sent {len(seeds)} seeds and {len(steps)} steps"
    if seeds.is_floating_point() or bool((seeds < 0).any()):
        smallest = f", the smallest {seeds.min().item()}" if len(seeds) else ""
        return (
            f"its seeds are {seeds.dtype}{smallest}, and must be whole numbers from 0 on; send what "
            "eigenpeft.combining.federation.train_steps returns"
        )
    if not torch.equal(count, expected[COUNT]):
        return f"it trains {int(count)} values, and the server {int(expected[COUNT])}"
    return None


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Move the trained values to where the steps of all rounds lead from the start, the same bits wherever this is done.

    The start is kept with the model the first time, so that a model may be rebuilt round after round.

    Args:
        model: At the start, or rebuilt before.
        tensors: The server's list.

    Raises:
        AdapterConfigError: If the model trains another number of values than the server's.
    """
    parameters = _trained(model)
    count = sum(parameter.numel() for parameter in parameters)
    if count != int(tensors[COUNT]):
        raise AdapterConfigError(
            f"The model trains {count} values, and the steps are of one that trains {int(tensors[COUNT])}: give every client the "
            "same adapter and head, and freeze the same parts."
        )
    if not hasattr(model, _START):
        object.__setattr__(model, _START, [parameter.detach().clone() for parameter in parameters])
    start = getattr(model, _START)
    _set(parameters, replay(start, tensors[SEEDS].tolist(), tensors[STEPS].tolist()))


def _steps(model: nn.Module, seeds: Sequence[int], steps: Sequence[float]) -> dict[str, Tensor]:
    count = sum(parameter.numel() for parameter in _trained(model))
    return {
        SEEDS: torch.tensor(seeds, dtype=torch.int64),
        STEPS: torch.tensor(steps, dtype=torch.float32),
        COUNT: torch.tensor([count], dtype=torch.int64),
    }


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    if not found:
        raise AdapterConfigError(
            "The model has no trained values; wrap it with get_peft_model, or set requires_grad on what is to be trained."
        )
    return found


def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
