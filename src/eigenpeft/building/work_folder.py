"""The work folder of a build: every finished module in a file of its own, so that an interrupted build goes on."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace.module import TENSOR_FIELDS, ModuleSubspace

_PLAN = "build_plan.json"


@dataclass(frozen=True, eq=False)
class FittedModule:
    """What fitting one module gives.

    Attributes:
        bases: Its part of the subspace.
        norms: ‖ΔW‖ of the adapters that have it, in the collection's order.
        missed_bound: Share of the energy of a side that its components miss at most, for the worse side; 0 where the
            factors of all adapters were in memory together.
    """

    bases: ModuleSubspace
    norms: tuple[float, ...]
    missed_bound: float = 0.0


class Shards:
    """Finished modules of one build, on disk.

    Files are named after a hash of the module's name, written under a temporary name and renamed, so that what carries
    its final name is whole. Processes of one build share the folder; each writes other modules.

    Args:
        folder: Made if absent.
        plan: Everything the result depends on, JSON-able: a folder that was begun with another plan is refused.

    Raises:
        SubspaceError: If the folder belongs to another build.
        ArtifactError: If it cannot be made or written.
    """

    def __init__(self, folder: str | Path, plan: Mapping[str, Any]):
        self.folder = Path(folder)
        text = json.dumps(plan, indent=1, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / _PLAN
            if not path.exists():
                self._write(path, lambda place: place.write_text(text, encoding="utf-8"))
            found = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ArtifactError(
                f"Cannot use the work folder {str(folder)!r}: {error.strerror or error}. Choose one you may write to."
            ) from error
        if found != text:
            raise SubspaceError(
                f"The work folder {str(folder)!r} holds an unfinished build of other adapters or settings "
                f"({_difference(found, plan)}). Run that build again to finish it, delete the folder, or pass another."
            )

    def __contains__(self, module: str) -> bool:
        return self._path(module).exists()

    def save(self, module: str, fitted: FittedModule) -> None:
        """Keep a finished module.

        Args:
            module: Its name.
            fitted: Its result.

        Raises:
            ArtifactError: If it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitted.bases.tensors().items()}
        tensors["norms"] = torch.tensor(fitted.norms, dtype=torch.float64)
        tensors["missed_bound"] = torch.tensor([fitted.missed_bound], dtype=torch.float64)
        self.save_tensors(module, tensors)

    def save_tensors(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished module.

        Args:
            module: Its name.
            tensors: Contiguous, on the CPU.

        Raises:
            ArtifactError: If they cannot be written.
        """
        try:
            self._write(self._path(module), lambda place: save_file(dict(tensors), place))
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
        """
        tensors = self.load_tensors(module, names=(*TENSOR_FIELDS, "norms", "missed_bound"))
        bases = ModuleSubspace(**{name: tensors[name] for name in TENSOR_FIELDS})
        return FittedModule(bases, tuple(tensors["norms"].tolist()), float(tensors["missed_bound"]))

    def load_tensors(self, module: str, *, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a finished module.

        Args:
            module: Its name.
            names: Of the tensors.

        Raises:
            ArtifactError: If it is not there or damaged.
        """
        path = self._path(module)
        try:
            tensors = load_file(path)
            return {name: tensors[name] for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtifactError(
                f"The finished module {module!r} cannot be read back from {str(path)!r} ({error}). The work folder must "
                "be one that all processes see. Delete the file and run the same command again to make it anew."
            ) from error

    def remove(self) -> None:
        """Delete the folder: the build is done, or can never be."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, module: str) -> Path:
        return self.folder / f"{hashlib.sha256(module.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, path: Path, write: Any) -> None:
        handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
        os.close(handle)
        try:
            write(Path(scratch))
            Path(scratch).replace(path)
        finally:
            Path(scratch).unlink(missing_ok=True)


def _difference(found: str, plan: Mapping[str, Any]) -> str:
    try:
        other = json.loads(found)
    except ValueError:
        return f"its {_PLAN} is damaged"
    names = [name for name in sorted({*other, *plan}) if other.get(name) != json.loads(json.dumps(plan)).get(name)]
    return f"different: {', '.join(names)}"
