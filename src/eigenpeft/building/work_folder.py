"""The work folder of a build: every finished module in a file of its own, so that an interrupted build goes on."""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.locks import one_writer
from eigenpeft.artifacts.reading import read_json
from eigenpeft.artifacts.storage import fingerprint
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace.module import TENSOR_FIELDS, ModuleSubspace

logger = logging.getLogger(__name__)

_PLAN = "build_plan.json"
_MARK = "eigenpeft_work_folder"  # key of the plan that says whose folder this is
_FORMAT_VERSION = 1
_SCRATCH = re.compile(r"\.(build_plan\.json|[0-9a-f]{32}\.safetensors)\.[0-9a-f]{8}\.tmp")
_SHOWN = 5  # names of foreign files in one message


@dataclass(frozen=True, eq=False)
class FittedModule:
    """What fitting one module gives.

    Attributes:
        bank: Its part of the subspace.
        norms: ‖ΔW‖ of the adapters that have it, in the collection's order.
        missed_bound: Share of the squared norm of a side that its components miss at most, for the worse side; 0 where the
            factors of all adapters were in memory together.
    """

    bank: ModuleSubspace
    norms: tuple[float, ...]
    missed_bound: float = 0.0


class Shards:
    """Finished modules of one build, on disk.

    Files are named after a hash of the module's name, written under a temporary name and renamed, and carry a hash of their
    tensors, so that what carries its final name and its hash is whole. Processes of one build share the folder; each writes
    other modules. Only files that a build wrote are ever deleted.

    Args:
        folder: Made if absent. One that holds anything but an unfinished build is refused.
        plan: Everything the result depends on, JSON-able, with the names of all modules under "modules"; the order of its
            entries counts. A folder that was begun with another plan is refused.
        inputs: Paths that are read; the folder must not be one of them or lie inside one.

    Raises:
        SubspaceError: If the folder belongs to another build.
        ArtifactError: If it holds other files, touches an input, or cannot be made or written.
    """

    def __init__(self, folder: str | Path, plan: Mapping[str, Any], *, inputs: tuple[str | Path, ...] = ()):
        self.folder = Path(folder)
        self._modules = tuple(plan.get("modules", ()))
        text = json.dumps({_MARK: _FORMAT_VERSION, **plan}, indent=1)
        self._plan_sha256 = hashlib.sha256(text.encode()).hexdigest()
        _check_inputs(self.folder, inputs)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / _PLAN
            if not path.exists():
                _check_foreign(self.folder)
                self._write(path, lambda place: place.write_text(text, encoding="utf-8"))
            found = path.read_text(encoding="utf-8")
        except ArtifactError:
            raise
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"Cannot use the work folder {str(folder)!r}: {getattr(error, 'strerror', None) or error}. Choose one you "
                "may write to."
            ) from error
        if not is_work_folder(self.folder):
            raise ArtifactError(
                f"Cannot use {str(folder)!r} as the work folder: its {_PLAN} was not written by eigenpeft. Name a new folder."
            )
        if found != text:
            raise SubspaceError(
                f"The work folder {str(folder)!r} holds an unfinished build of other adapters or settings "
                f"({_difference(found, plan)}). Run that build again to finish it, delete the folder, or pass another."
            )

    def __contains__(self, module: str) -> bool:
        return self._path(module).exists()

    def only_writer(self) -> AbstractContextManager[None]:
        """Hold the folder against another build of the same; for the main process of a launch.

        Raises:
            ArtifactError: On entering, if another build is using the folder.
        """
        return one_writer(self.folder, timeout=2.0)

    def forget_damaged(self) -> None:
        """Delete the modules that cannot be read back or do not have their hash, with a warning: they are fitted again."""
        for module in self._modules:
            if module in self:
                try:
                    self.load_tensors(module, names=())
                except ArtifactError as error:
                    logger.warning("%s It is fitted again.", error)
                    with suppress(OSError):
                        self._path(module).unlink()
        for file in self.folder.iterdir():
            if _SCRATCH.fullmatch(file.name):  # of a process that was killed
                _delete(file)

    def save(self, module: str, fitted: FittedModule) -> None:
        """Keep a finished module.

        Args:
            module: Its name.
            fitted: Its result.

        Raises:
            ArtifactError: If it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitted.bank.tensors().items()}
        tensors["norms"] = torch.tensor(fitted.norms, dtype=torch.float64)
        tensors["missed_bound"] = torch.tensor([fitted.missed_bound], dtype=torch.float64)
        tensors["paired"] = torch.tensor([fitted.bank.paired])
        self.save_tensors(module, tensors)

    def save_tensors(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished module.

        Args:
            module: Its name.
            tensors: Contiguous, on the CPU.

        Raises:
            ArtifactError: If they cannot be written.
        """
        metadata = {"sha256": fingerprint(tensors), "module": module, "plan": self._plan_sha256}
        try:
            self._write(self._path(module), lambda place: save_file(dict(tensors), place, metadata=metadata))
        except (OSError, SafetensorError) as error:  # a full disk arrives as the latter
            raise ArtifactError(
                f"Could not keep the finished module {module!r} in {str(self.folder)!r}: {error}. Free some space and "
                "run the same command again: it goes on from there."
            ) from error

    def load(self, module: str) -> FittedModule:
        """A finished module.

        Args:
            module: Its name.

        Raises:
            ArtifactError: If it is not there or damaged.
            SubspaceError: If its tensors do not fit each other.
        """
        tensors = self.load_tensors(module, names=(*TENSOR_FIELDS, "norms", "missed_bound", "paired"))
        fields = {name: tensors[name] for name in TENSOR_FIELDS}
        bank = ModuleSubspace(**fields, paired=bool(tensors["paired"]))
        return FittedModule(bank, tuple(tensors["norms"].tolist()), float(tensors["missed_bound"]))

    def load_tensors(self, module: str, *, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a finished module, whose hash is checked.

        Args:
            module: Its name.
            names: Names of the tensors.

        Raises:
            ArtifactError: If it is not there or damaged.
        """
        path = self._path(module)
        try:
            tensors, metadata = read_tensors(path)
            if metadata != {"sha256": fingerprint(tensors), "module": module, "plan": self._plan_sha256}:
                raise ValueError("its numbers do not have their hash, or it is of another module or build")
            return {name: tensors[name] for name in names}
        except (ArtifactError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"The finished module {module!r} cannot be read back from {str(path)!r} ({error}). The work folder must "
                "be one that all processes see; otherwise the file was damaged."
            ) from error

    def remove(self) -> None:
        """Delete what the build wrote, and the folder if nothing else is in it: the build is done, or can never be."""
        ours = {self._path(module).name for module in self._modules} | {_PLAN}
        with suppress(OSError):
            # The plan goes last: what is left by an interruption is still known as ours.
            for file in sorted(self.folder.iterdir(), key=lambda file: file.name == _PLAN):
                if file.name in ours or _SCRATCH.fullmatch(file.name):
                    _delete(file)
            self.folder.rmdir()

    def _path(self, module: str) -> Path:
        return self.folder / f"{hashlib.sha256(module.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, path: Path, write: Any) -> None:
        # A folder, since safetensors puts a file of its own beside the one that it is asked to write.
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            scratch.mkdir()
            write(scratch / path.name)
            with (scratch / path.name).open("rb") as file:
                os.fsync(file.fileno())
            (scratch / path.name).replace(path)
        finally:
            _delete(scratch)


def is_work_folder(folder: str | Path) -> bool:
    """Whether a folder was begun by a build of this version.

    Args:
        folder: The folder, which may be absent.
    """
    try:
        plan = read_json(Path(folder) / _PLAN)
    except (OSError, ValueError):
        return False
    return isinstance(plan, dict) and plan.get(_MARK) == _FORMAT_VERSION


def _delete(path: Path) -> None:
    """Delete a file or a scratch folder of ours, which may be gone."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _check_inputs(folder: Path, inputs: tuple[str | Path, ...]) -> None:
    work = Path(os.path.realpath(folder))
    for source in inputs:
        place = Path(os.path.realpath(source))
        if place.exists() and (work == place or place in work.parents):
            raise ArtifactError(
                f"Cannot use {str(folder)!r} as the work folder: it is or lies inside {str(source)!r}, which is read. Name a "
                "new folder."
            )


def _check_foreign(folder: Path) -> None:
    foreign = sorted(file.name for file in folder.iterdir() if not _SCRATCH.fullmatch(file.name))
    # Another process of the same launch may have written the plan by now.
    if foreign and not (folder / _PLAN).exists():
        names = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
        raise ArtifactError(
            f"Cannot use {str(folder)!r} as the work folder: it holds other files ({names}). Name a new or an empty folder."
        )


def _difference(found: str, plan: Mapping[str, Any]) -> str:
    try:
        other = json.loads(found)
    except ValueError:
        return f"its {_PLAN} is damaged"
    del other[_MARK]
    names = [name for name in sorted({*other, *plan}) if other.get(name) != json.loads(json.dumps(plan)).get(name)]
    return f"different: {', '.join(names)}"
