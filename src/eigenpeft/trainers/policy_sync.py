"""A callback that hands the adapter in training to an inference engine: as a plain LoRA, whole, at every synchronisation."""

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from eigenpeft.engines.resolver import VLLM_RANKS
from eigenpeft.engines.syncing import AdapterEndpoints
from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.tuners.files.export import read_adapter
from eigenpeft.tuners.files.lora_files import write_lora

_ASYNC_GRPO = "trl.experimental.async_grpo.async_grpo_trainer"


def save_plain_lora(model: Any, *, adapter_name: str, out_dir: str | Path) -> None:
    """Write an adapter in training as a plain LoRA of a rank that vLLM takes; whole or not at all.

    Args:
        model: PEFT model with the adapter.
        adapter_name: The adapter.
        out_dir: Folder to make.

    Raises:
        AdapterConfigError: If a plain LoRA cannot express the adapter, its parameters are sharded, or it has heads.
        ArtifactError: If the folder cannot be written.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise AdapterConfigError(
            "The model's parameters are sharded (FSDP); synchronise an adapter from unsharded processes."
        )
    updates, fields, others = read_adapter(model, adapter_name, rank=None)
    own: dict[str, Tensor] = {key: tensor for key, tensor in others.items() if not key.endswith(".base_layer.weight")}
    if own:
        raise AdapterConfigError(
            f"{adapter_name!r} trains {next(iter(own))!r} in full, which engines do not load with a LoRA; leave it out."
        )
    largest = max(update.rank for update in updates)
    rank = min((rank for rank in VLLM_RANKS if rank >= largest), default=largest)
    write_lora(Path(out_dir), updates=updates, fields=fields, others={}, rank=rank, overwrite=True)


class PolicySyncCallback(TrainerCallback):
    """Publishes the adapter in training every few steps as `FOLDER/NAME-vSTEP`, and loads it into a server.

    Each version has a name and a path of its own: engines keep what they computed with an earlier one by name. A server is
    asked to load the new version before the oldest is unloaded, and folders outlive their unloading by one version, since
    engines read them when they first need them.

    Args:
        out_dir: Where versions are written; a server must see it under the same path.
        every: Steps between versions.
        name: Start of the versions' names.
        keep: How many versions stay.
        server: Address of a vLLM or SGLang server to load them into; None only writes.
        adapter_name: Which adapter of the model.

    Raises:
        EigenPeftError: If `every` or `keep` is not positive, or the server cannot load adapters.

    Examples:
        >>> callback = PolicySyncCallback("policies", every=8)
        >>> callback.latest is None  # until the first version is written
        True
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        every: int = 1,
        name: str = "policy",
        keep: int = 2,
        server: str | None = None,
        adapter_name: str = "default",
    ):
        if every < 1 or keep < 1:
            raise EigenPeftError(f"every={every} and keep={keep} must be whole numbers of at least 1.")
        self.out_dir, self.every, self.name, self.keep = Path(out_dir).resolve(), every, name, keep
        self.adapter_name = adapter_name
        self.latest: str | None = None
        self._endpoints = None if server is None else AdapterEndpoints(server)
        self._versions: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Publish the start.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state, for the step.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.

        Raises:
            AdapterConfigError: If a plain LoRA cannot express the adapter, its parameters are sharded, or it has heads.
            ArtifactError: If the folder cannot be written.
            EigenPeftError: If the server cannot be reached or does not load it.
        """
        self._publish(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Publish every few steps.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state, for the step.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.

        Raises:
            AdapterConfigError, ArtifactError, EigenPeftError: As `on_train_begin`.
        """
        if state.global_step % self.every == 0:
            self._publish(model, state)

    def _publish(self, model: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        version = f"{self.name}-v{state.global_step}"
        save_plain_lora(model, adapter_name=self.adapter_name, out_dir=self.out_dir / version)
        if self._endpoints is not None:
            answer = self._endpoints.load(version, self.out_dir / version)
            if answer is not None:
                raise EigenPeftError(
                    f"The server did not load {version!r}: {answer}. It must see {str(self.out_dir)!r} under the same path and "
                    "allow adapters to be loaded while it runs."
                )
        self._versions.append(version)
        self.latest = version
        if len(self._versions) > self.keep and self._endpoints is not None:
            self._endpoints.unload(self._versions[-1 - self.keep])
        while len(self._versions) > self.keep + 1:
            shutil.rmtree(self.out_dir / self._versions.pop(0), ignore_errors=True)


@contextmanager
def plain_lora_for_async_grpo() -> Iterator[None]:
    """In the block, TRL's asynchronous GRPO sends our adapters to vLLM as plain LoRA.

    `AsyncGRPOTrainer` sends the adapter alone where the server has LoRA enabled, as the files that PEFT writes, which of
    EigenLoRA and MoSLoRA vLLM cannot read. Its function that writes them (`save_lora_adapter`) is replaced for adapters that
    are not plain LoRA; all else stays TRL's.

    Raises:
        EigenPeftError: If this TRL has no such function.
    """
    trainer = importlib.import_module(_ASYNC_GRPO)  # an experimental part of an optional package
    original: Callable[..., None] | None = getattr(trainer, "save_lora_adapter", None)
    if original is None:
        raise EigenPeftError(
            f"This TRL has no {_ASYNC_GRPO}.save_lora_adapter, which TRL 1.16 has; install that version."
        )

    def save(model: Any, accelerator: Any, adapter_name: str, dest_dir: str) -> None:
        kind = model.peft_config[adapter_name].peft_type
        if getattr(kind, "value", kind) == "LORA":
            original(model, accelerator, adapter_name, dest_dir)
        elif accelerator.is_main_process:
            save_plain_lora(model, adapter_name=adapter_name, out_dir=dest_dir)

    trainer.save_lora_adapter = save  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        trainer.save_lora_adapter = original  # pyright: ignore[reportAttributeAccessIssue]
