"""The input directions that earlier tasks used, by module, within a bound of rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eigenpeft.artifacts.atomic import atomic_file
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.errors import AdapterConfigError, ArtifactError, DamagedFileError
from eigenpeft.linalg.bases.sequences import frequent_directions, grow_memory

_PREFIX = "base_model.model."


class SubspaceHistory:
    """Rows of earlier tasks' A, or directions of their inputs, by module.

    Rows are kept as they are while there are at most `max_rows` of them in a module; beyond that a Frequent-Directions sketch takes
    their place (`frequent_directions` has its bound).

    Args:
        max_rows: Largest number of rows of a module.

    Raises:
        AdapterConfigError: If `max_rows` is less than 1.

    Attributes:
        rows: Module to its rows (rows, in_features), float32; modules by their name in the base model. Of a convolution
            in_features is in_channels times the size of the kernel, of EigenLoRA the components of the input side.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> history = SubspaceHistory()
        >>> history.add(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
        >>> {name: tuple(rows.shape) for name, rows in history.rows.items()}
        {'0': (2, 6)}
    """

    def __init__(self, *, max_rows: int = 64):
        if type(max_rows) is not int or max_rows < 1:
            raise AdapterConfigError(
                f"max_rows={max_rows!r} must be a whole number of at least 1: rows kept of a module."
            )
        self.max_rows = max_rows
        self.rows: dict[str, Tensor] = {}

    def add(self, model: nn.Module, *, adapter_name: str = "default") -> None:
        """Remember the A of a task that has been trained.

        Args:
            model: Model with LoRA layers, or with EigenLoRA's of the core "low_rank" (rows are then C_in, in one subspace).
            adapter_name: Its adapter.

        Raises:
            AdapterConfigError: If the adapter has no such factors, or rows of another width are kept of a module. Nothing is
                remembered then.
        """
        found = [
            (module, factor.detach().flatten(1).float().cpu()) for module, factor in input_factors(model, adapter_name)
        ]
        for module, new in found:
            self._check_rows(module, new)
        for module, new in found:
            old = self.rows.get(module, new[:0])
            both = torch.cat([old, new])
            fits = len(both) <= self.max_rows
            self.rows[module] = both if fits else frequent_directions(old, new, size=self.max_rows).float()

    def add_inputs(self, inputs: Mapping[str, Tensor], *, held_share: float = 0.95) -> None:
        """Remember the directions that a task's inputs have, so many that a share of their squared norm is held.

        Args:
            inputs: Module to rows (rows, in_features), as `collect_inputs` gives them.
            held_share: In (0, 1]; `max_rows` bounds it.

        Raises:
            AdapterConfigError: If a module's inputs are no rows, or rows of another width are kept of it.
            ValueError: If `held_share` is not in (0, 1], or more rows are kept of a module than it has inputs.
        """
        for module, rows in inputs.items():
            self._check_rows(module, rows)
        for module, rows in inputs.items():
            memory = self.rows.get(module, rows[:0])
            self.rows[module] = grow_memory(memory, rows, held_share=held_share)[: self.max_rows].float()

    def _check_rows(self, module: str, rows: Tensor) -> None:
        """Refuse rows that cannot go beside those of earlier tasks."""
        kept = self.rows.get(module)
        if rows.ndim != 2 or (kept is not None and kept.shape[1] != rows.shape[1]):
            has = f", and the history has rows of width {kept.shape[1]} of it" if kept is not None else ""
            raise AdapterConfigError(
                f"The rows of {module!r} have the shape {tuple(rows.shape)}{has}; pass (rows, in_features) of one model, with a "
                "history of its own for each model."
            )

    def save(self, out_file: str | Path, *, overwrite: bool = False) -> None:
        """Write the rows as a safetensors file, whole or not at all.

        Args:
            out_file: The file.
            overwrite: Whether a file of that name may be replaced.

        Raises:
            ArtifactError: If a file is there, or the place cannot be written.
        """
        with atomic_file(out_file, overwrite=overwrite) as scratch:
            rows = {module: rows.contiguous() for module, rows in self.rows.items()}
            save_file(rows, scratch, metadata={"size": str(self.max_rows)})

    @classmethod
    def load(cls, path: str | Path, *, max_rows: int = 64) -> "SubspaceHistory":
        """Read what `save` wrote.

        Args:
            path: The file.
            max_rows: As for the class.

        Raises:
            AdapterConfigError: If `max_rows` is less than 1.
            ArtifactError: If the file cannot be read, or holds something else.
        """
        history = cls(max_rows=max_rows)
        try:
            with TensorFile(path) as file:
                history.rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (DamagedFileError, OSError, ValueError) as error:
            raise ArtifactError(f"The history {str(path)!r} cannot be read ({error}).") from error
        odd = [name for name, rows in history.rows.items() if rows.ndim != 2 or not bool(rows.isfinite().all())]
        if odd:
            raise ArtifactError(
                f"The history {str(path)!r} has no rows of finite numbers for {odd[0]!r}: it was altered. Collect "
                "the inputs again."
            )
        return history


def input_factors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(module, A) of every layer that has an adapter: LoRA's A, or EigenLoRA's C_in.

    Args:
        model: Adapted model.
        adapter_name: Adapter.

    Raises:
        AdapterConfigError: If there is none.
    """
    found = False
    for path, layer in model.named_modules():
        factors = getattr(layer, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict) or adapter_name not in factors:
            continue
        factor = factors[adapter_name]
        rows = getattr(factor, "coefficients", None)  # a core's C_in; its weight is computed from it
        rows = getattr(factor, "weight", None) if rows is None else rows
        if isinstance(rows, nn.Parameter):
            found = True
            yield path.removeprefix(_PREFIX), rows
    if not found:
        raise AdapterConfigError(
            f"The adapter {adapter_name!r} has no input factor A in any layer: sequences of tasks need LoRA, or EigenLoRA with "
            "core='low_rank', on linear or convolutional layers."
        )
