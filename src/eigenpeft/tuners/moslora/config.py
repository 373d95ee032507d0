"""Configuration of MoSLoRA."""

from dataclasses import dataclass, field
from typing import Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options
from eigenpeft.version import __version__

MIXER_STARTS = ("kaiming", "orthogonal", "identity")


@dataclass
class MosLoraConfig(ExplainedConfig):
    """Mixture-of-subspaces LoRA: `ΔW = s·B·M·A` with a trained r x r mixer M (arXiv 2406.11909, equation 3).

    All of `peft.LoraConfig`'s fields apply. It folds exactly into a plain LoRA (`B' = B M`) when merged or exported, so
    what it changes is the course of training, not what can be expressed; compare with plain LoRA before choosing it.

    Raises:
        AdapterConfigError: If a field has a value that the method does not define.

    Examples:
        >>> from eigenpeft import MosLoraConfig
        >>> MosLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).init_mixer
        'kaiming'
    """

    method_name = "MoSLoRA"

    init_mixer: Literal["kaiming", "orthogonal", "identity"] = field(
        default="kaiming",
        metadata={
            "help": "Start of the mixer: 'kaiming' (uniform, a = sqrt 5), the paper's best with 'orthogonal'; 'identity' "
            "is plain LoRA at the start. A zero mixer never learns and is not offered."
        },
    )
    train_mixer: bool = field(
        default=True,
        metadata={
            "help": "Train the mixer. False keeps it as it starts, a control: with an orthogonal one this trains as LoRA does."
        },
    )
    fold: bool = field(
        default=False,
        metadata={
            "help": "Start a plain LoRA from the folded start of MoSLoRA (A' = M A, no mixer afterwards): the control that "
            "tells what the mixer's training adds to its start. Linear layers, Conv1D, embeddings, convolutions without groups."
        },
    )
    requires_package: str = field(
        default="eigenpeft",
        metadata={"help": "Written to adapter_config.json to tell readers what to install: pip install eigenpeft."},
    )
    eigenpeft_version: str = field(default=__version__, metadata={"help": "Version that wrote the adapter."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("MOSLORA")
        if self.init_mixer not in MIXER_STARTS:
            raise AdapterConfigError(
                f"init_mixer={self.init_mixer!r} must be one of {', '.join(map(repr, MIXER_STARTS))}."
            )
        check_lora_options(self, method="MoSLoRA")
