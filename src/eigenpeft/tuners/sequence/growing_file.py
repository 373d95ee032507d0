"""What a growing classifier knows, in one safetensors file: prototypes, whose classes they are, names and settings."""

import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.errors import ArtifactError, DamagedFileError

_METADATA, _OWNERS, _PROTOTYPES = "growing_classifier", "owners", "prototypes."


@dataclass(frozen=True)
class GrowingState:
    """All that a growing classifier knows.

    Attributes:
        classes: Names, in the order of the logits.
        adapters: Names, in the order of the tasks.
        owners: (classes,) number of the adapter that each class came with.
        prototypes: (classes, features) per adapter.
        weight: Weight of the spaces of other adapters than a class's own.
        complete: Whether prototypes are completed.
    """

    classes: tuple[Hashable, ...]
    adapters: tuple[str, ...]
    owners: Tensor
    prototypes: list[Tensor]
    weight: float
    complete: bool


def write_growing(out_file: str | Path, state: GrowingState, *, overwrite: bool) -> None:
    """Write a state, whole or not at all.

    Args:
        out_file: The file.
        state: What to write.
        overwrite: Whether a file of that name may be replaced.

    Raises:
        ArtifactError: If a class's name is neither text nor a whole number, a file is there, or the place cannot be written.
    """
    odd = [name for name in state.classes if isinstance(name, bool) or not isinstance(name, (str, int))]
    if odd:
        raise ArtifactError(
            f"The class {odd[0]!r} is a {type(odd[0]).__name__}; a file keeps names that are text or whole numbers. Name the "
            "classes so before they are added."
        )
    settings = {
        "classes": state.classes,
        "adapters": state.adapters,
        "weight": state.weight,
        "complete": state.complete,
    }
    tensors = {_OWNERS: state.owners} | {f"{_PROTOTYPES}{i}": each for i, each in enumerate(state.prototypes)}
    with atomic_file(out_file, overwrite=overwrite) as scratch:
        # Further texts beside it would be written in an order that changes from call to call.
        owned = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(owned, scratch, metadata={_METADATA: json.dumps(settings)})


def read_growing(path: str | Path) -> GrowingState:
    """Read what `write_growing` wrote.

    Args:
        path: The file.

    Raises:
        ArtifactError: If the file cannot be read, or holds something else.
    """
    try:
        with TensorFile(path) as file:
            settings = json.loads(file.metadata[_METADATA])
            adapters = tuple(settings["adapters"])
            prototypes = [file.get_tensor(f"{_PROTOTYPES}{i}") for i in range(len(adapters))]
            owners = file.get_tensor(_OWNERS)
            state = GrowingState(
                classes=tuple(settings["classes"]),
                adapters=adapters,
                owners=owners,
                prototypes=prototypes,
                weight=float(settings["weight"]),
                complete=bool(settings["complete"]),
            )
    except (DamagedFileError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtifactError(
            f"{str(path)!r} is not a growing classifier that can be read ({reason}). Name a file that `save` wrote."
        ) from error
    _check(path, state)
    return state


def _check(path: str | Path, state: GrowingState) -> None:
    n, names = len(state.classes), all(isinstance(name, (str, int)) for name in (*state.classes, *state.adapters))
    fits = (
        names
        and n == len(set(state.classes))
        and state.owners.shape == (n,)
        and state.owners.dtype == torch.int64
        and bool(((state.owners >= 0) & (state.owners < max(1, len(state.adapters)))).all())
        and all(each.ndim == 2 and len(each) == n and each.is_floating_point() for each in state.prototypes)
        and all(bool(each.isfinite().all()) for each in state.prototypes)
        and 0 <= state.weight < float("inf")
    )
    if not fits:
        raise ArtifactError(
            f"{str(path)!r} does not fit together: {n} classes, {len(state.adapters)} adapters, owners of shape "
            f"{tuple(state.owners.shape)}, prototypes of shapes {[tuple(each.shape) for each in state.prototypes]}, weight "
            f"{state.weight}. It was altered; get it again."
        )
