"""TRL's model arguments with ours beside them, and the PEFT config they ask for (imported only where TRL is installed)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig, PeftConfig
from trl.trainer.model_config import ModelConfig

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners import EigenLoraConfig, MosLoraConfig, control_config
from eigenpeft.tuners.controls import Control


def _described(config: type[PeftConfig], name: str) -> dict[str, str]:
    fields = {each.name: each for each in dataclasses.fields(config)}
    return {"help": f"{config.__name__.removesuffix('Config')}: {fields[name].metadata['help']}"}


@dataclass
class EigenModelConfig(ModelConfig):
    """`trl.ModelConfig` whose adapter is one of ours; the lora_* flags keep their meaning."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; --no_use_peft trains the whole model."})
    peft_method: Literal["eigenlora", "moslora", "lora"] = field(
        default="eigenlora", metadata={"help": "Method of the adapter; 'lora' is TRL's own, as a control."}
    )
    subspace: str | None = field(default=None, metadata=_described(EigenLoraConfig, "subspace"))
    subspace_revision: str | None = field(default=None, metadata=_described(EigenLoraConfig, "subspace_revision"))
    n_components: int | None = field(default=None, metadata=_described(EigenLoraConfig, "n_components"))
    core: Literal["low_rank", "full", "diagonal", "mixture", "mixer"] = field(
        default="low_rank", metadata=_described(EigenLoraConfig, "core")
    )
    init_from: str | None = field(default=None, metadata=_described(EigenLoraConfig, "init_from"))
    init_adapters: list[str] | None = field(default=None, metadata=_described(EigenLoraConfig, "init_adapters"))
    init_scale: str | None = field(default=None, metadata=_described(EigenLoraConfig, "init_scale"))
    sources: str | None = field(default=None, metadata=_described(EigenLoraConfig, "sources"))
    weights: Literal["adapter", "module"] = field(default="adapter", metadata=_described(EigenLoraConfig, "weights"))
    save_subspace: Literal["reference", "embed"] = field(
        default="reference", metadata=_described(EigenLoraConfig, "save_subspace")
    )
    control: Control | None = field(
        default=None,
        metadata={
            "help": "EigenLoRA: train a control of this run instead: another subspace of the same size, or a plain LoRA with "
            "as many parameters or of the same rank. Each wants a learning rate of its own."
        },
    )
    adapters: list[str] | None = field(
        default=None, metadata={"help": "The adapters that the subspace was built from, for --control mean_only."}
    )
    init_mixer: Literal["kaiming", "orthogonal", "identity"] = field(
        default="kaiming", metadata=_described(MosLoraConfig, "init_mixer")
    )

    def __post_init__(self):
        """As TRL's, which makes a string, hence a regular expression, of one name; one plain name stays a name."""
        names = self.lora_target_modules
        super().__post_init__()
        if isinstance(names, list) and len(names) == 1 and names[0].replace(".", "_").isidentifier():
            self.lora_target_modules = names


EIGENLORA_FIELDS = (
    "subspace",
    "subspace_revision",
    "n_components",
    "core",
    "init_from",
    "init_adapters",
    "init_scale",
    "sources",
    "weights",
    "save_subspace",
)


def peft_config_from(arguments: EigenModelConfig) -> PeftConfig | None:
    """The config that the arguments describe; None when the whole model is trained.

    Args:
        arguments: As parsed.

    Raises:
        AdapterConfigError: If EigenLoRA is asked for without a subspace, or a flag belongs to another method.
    """
    if not arguments.use_peft:
        return None
    method = arguments.peft_method
    _check_flags(arguments)
    shared: dict[str, Any] = {
        "task_type": arguments.lora_task_type,
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        "target_modules": arguments.lora_target_modules,
        "modules_to_save": arguments.lora_modules_to_save,
        "use_rslora": arguments.use_rslora,
        "use_dora": arguments.use_dora,
    }
    if arguments.lora_target_parameters is not None:
        shared["target_parameters"] = arguments.lora_target_parameters
    if method == "eigenlora":
        own: dict[str, Any] = {name: getattr(arguments, name) for name in EIGENLORA_FIELDS}
        own["init_scale"] = _number_or_word(arguments.init_scale)
        config = EigenLoraConfig(**shared, **own)
        if arguments.control is None:
            return config
        collection = AdapterCollection.from_pretrained(arguments.adapters) if arguments.adapters else None
        return control_config(config, control=arguments.control, collection=collection)
    if method == "moslora":
        return MosLoraConfig(**shared, init_mixer=arguments.init_mixer)
    return LoraConfig(**shared)


def _number_or_word(value: str | None) -> float | str | None:
    try:
        return value if value is None else float(value)
    except ValueError:
        return value


def _check_flags(arguments: EigenModelConfig) -> None:
    method = arguments.peft_method
    if method == "eigenlora" and arguments.subspace is None and arguments.sources is None:
        raise AdapterConfigError(
            "EigenLoRA needs --subspace, a folder or Hub id; make one with 'eigenpeft build adapters/ --out subspace'. "
            "Or choose --peft_method moslora or lora, which need none."
        )
    defaults = {each.name: each.default for each in dataclasses.fields(EigenModelConfig)}
    foreign = () if method == "eigenlora" else (*EIGENLORA_FIELDS, "control", "adapters")
    foreign += () if method == "moslora" else ("init_mixer",)
    given = [f"--{name}" for name in foreign if getattr(arguments, name) != defaults[name]]
    if given:
        raise AdapterConfigError(
            f"{', '.join(given)} mean nothing to --peft_method {method}; leave them out or choose the method they are for."
        )
