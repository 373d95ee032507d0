"""What a run of TRL trains: said before the first step, and written on the card of its output in the place of TRL's draft."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from eigenpeft.cli.app import console
from eigenpeft.report.markup import escape
from eigenpeft.subspace.cores import core_kind
from eigenpeft.tuners.host.adapter_card import trained_card


class SaysWhatItTrains:
    """Mixed into a trainer of TRL whose model has an adapter.

    Args:
        *arguments: TRL's.
        **keywords: TRL's.

    Attributes:
        command: Name of the script, such as "sft".
        title: What it does, in words.
        data: What it trains on, as it was named.
    """

    command: str
    title: str
    data: str

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        trainer: Any = self
        if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
            console.print(escape(f"Training {trained_text(trainer.model)}."), soft_wrap=True)

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """Our card of the adapter; TRL's own where the whole model is trained.

        Args:
            *arguments: TRL's.
            **keywords: TRL's.
        """
        trainer: Any = self
        if not isinstance(trainer.model, PeftModel):
            super().create_model_card(*arguments, **keywords)  # pyright: ignore[reportAttributeAccessIssue]
        elif trainer.is_world_process_zero():
            steps, rate = trainer.state.global_step, trainer.args.learning_rate
            facts = {
                "trained": trained_text(trainer.model),
                "training": f"{self.title}, {steps} steps, learning rate {rate:g}",
                "data": _shown(self.data),
            }
            trained_card(Path(trainer.args.output_dir), trainer.model, made_by=f"eigenpeft {self.command}", facts=facts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As TRL's, and the card, in the place of PEFT's draft.

        Args:
            output_dir: Folder; None for the run's own.
            _internal_call: Whether a checkpoint or an upload saves.
        """
        super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
        trainer: Any = self
        if not _internal_call and isinstance(trainer.model, PeftModel):
            self.create_model_card()


def trained_text(model: PeftModel) -> str:
    """How many values are trained, of how many, and in which subspace and core.

    Args:
        model: With the adapter that is trained.
    """
    trained, total = model.get_nb_trainable_parameters()
    config: Any = model.peft_config[str(model.active_adapter)]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "EIGENLORA":
        place = config.subspace or config.sources
        where = f"the subspace {_shown(place)}" if isinstance(place, str) else "a subspace in memory"
        rank = f", r {config.r}" if core_kind(config.core).is_factored else ""
        number = f", K {config.n_components}" if config.n_components else ""
        what = f"core {config.core}{rank}{number} in {where}"
    else:
        what = f"{ {'LORA': 'a LoRA', 'MOSLORA': 'a MoSLoRA adapter'}.get(kind, f'an adapter of type {kind}') }, r {config.r}"
    return f"{trained:,} values ({trained / total:.3%} of the model's {total:,}): {what}"


def _shown(place: str) -> str:
    """A Hub id, or of a local path the name alone: cards are published."""
    return Path(place).resolve().name if Path(place).exists() else place
