"""The state of a federation on disk: what the server averaged last, and a record of each round; written whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.atomic import atomic_folder
from eigenpeft.artifacts.reading import read_json
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.errors import ArtifactError

KIND = "federation"
"""What messages call the folder."""
_TENSORS, _CONFIG, _FORMAT = "arrays.safetensors", "federation.json", 1


@dataclass(frozen=True)
class Rounds:
    """A federation as it was saved.

    Attributes:
        tensors: The server's, after the last round.
        rounds: One record per round that is done.
        settings: What the federation was started with, which a later start must repeat.
    """

    tensors: Mapping[str, Tensor]
    rounds: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]


def save_rounds(rounds: Rounds, out_dir: str | Path) -> None:
    """Write the state, whole or not at all, in the place of the round before.

    Args:
        rounds: What to write.
        out_dir: Folder of the federation, made where there is none.

    Raises:
        ArtifactError: If the folder cannot be written, or holds something else.
    """
    config = {"format_version": _FORMAT, "settings": dict(rounds.settings), "rounds": [*map(dict, rounds.rounds)]}
    with atomic_folder(out_dir, kind=KIND, overwrite=True) as scratch:
        save_file({key: tensor.contiguous() for key, tensor in rounds.tensors.items()}, scratch / _TENSORS)
        (scratch / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_rounds(folder: str | Path, *, settings: Mapping[str, Any]) -> Rounds | None:
    """The state in a folder, to go on from; None where there is none.

    Args:
        folder: Its folder.
        settings: What the federation is started with.

    Raises:
        ArtifactError: If the files are damaged, or of a federation with other settings.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        return None
    try:
        config = read_json(folder / _CONFIG)
        own, rounds = dict(config["settings"]), tuple(dict(each) for each in config["rounds"])
        if config["format_version"] != _FORMAT:
            raise ValueError(f"format_version {config['format_version']!r}, and this version reads {_FORMAT}")
        with TensorFile(folder / _TENSORS) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"The federation in {str(folder)!r} cannot be read ({error}); name a new folder to start again."
        ) from error
    changed = [name for name in {**own, **settings} if own.get(name) != settings.get(name)]
    if changed:
        name = changed[0]
        raise ArtifactError(
            f"{str(folder)!r} holds a federation with {name}={own.get(name)!r}, and this one has "
            f"{name}={settings.get(name)!r}. Start it with the same settings, or name a new folder."
        )
    return Rounds(tensors, rounds, own)
