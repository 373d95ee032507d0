"""The commands sft, dpo, kto, reward, grpo, rloo and distillation: TRL's own scripts with this package's methods."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import typer
from peft import PeftConfig

from eigenpeft.cli.app import app
from eigenpeft.errors import EigenPeftError
from eigenpeft.tuners import EigenLoraConfig, MosLoraConfig

SCRIPTS = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "reward": "A reward model",
    "grpo": "Group relative policy optimisation",
    "rloo": "REINFORCE leave-one-out",
    "distillation": "Distillation from a teacher",
}


@dataclass
class MethodArguments:
    """What these commands add to the options of TRL's scripts; r, alpha, dropout and modules stay TRL's --lora_*.

    Examples:
        >>> MethodArguments(peft_method="moslora").init_mixer
        'kaiming'
    """

    peft_method: Literal["eigenlora", "moslora", "lora"] = field(
        default="eigenlora",
        metadata={"help": "Method to train with; 'lora' is TRL's own LoRA, the control. --use_peft is implied."},
    )
    subspace: str | None = field(
        default=None, metadata={"help": "EigenLoRA: folder or Hub id of the subspace or of a coefficient store."}
    )
    subspace_revision: str | None = field(default=None, metadata={"help": "EigenLoRA: Hub revision of the subspace."})
    n_components: int | None = field(
        default=None, metadata={"help": "EigenLoRA: use only the first n_components of each module."}
    )
    core: Literal["low_rank", "mixer", "diagonal"] = field(
        default="low_rank", metadata={"help": "EigenLoRA: form of the trained core."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "EigenLoRA: LoRA adapter, or '<store>#<member>', to start from."}
    )
    save_subspace: Literal["reference", "embed"] = field(
        default="reference", metadata={"help": "EigenLoRA: save coefficients only, or the components with them."}
    )
    init_mixer: Literal["kaiming", "orthogonal", "identity"] = field(
        default="kaiming", metadata={"help": "MoSLoRA: start of the mixer."}
    )


def method_config(arguments: Any, *, task_type: str) -> PeftConfig:
    """The configuration that the options ask for.

    Args:
        arguments: TRL's ModelConfig with the fields of `MethodArguments`.
        task_type: PEFT's task type, "CAUSAL_LM" or "SEQ_CLS".

    Raises:
        EigenPeftError: If EigenLoRA is asked for without a subspace.
    """
    shared = {
        "task_type": task_type,
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        "target_modules": arguments.lora_target_modules,
        "modules_to_save": arguments.lora_modules_to_save,
        "use_rslora": arguments.use_rslora,
        "use_dora": arguments.use_dora,
    }
    if arguments.peft_method == "moslora":
        return MosLoraConfig(**shared, init_mixer=arguments.init_mixer)
    if arguments.subspace is None:
        raise EigenPeftError(
            "EigenLoRA needs --subspace: the folder or Hub id of a subspace, which `eigenpeft build` makes. For a method "
            "without one pass --peft_method moslora, or lora for the control."
        )
    names = ("subspace", "subspace_revision", "n_components", "core", "init_from", "save_subspace")
    return EigenLoraConfig(**shared, **{name: getattr(arguments, name) for name in names})


@contextmanager
def _our_methods_in(trl: Any, *, task_type: str) -> Iterator[None]:
    """TRL's scripts look both names up in `trl` when they run; its own get_peft_config knows LoRA alone."""
    model_config, get_peft_config = trl.ModelConfig, trl.get_peft_config

    def choose(arguments: Any) -> PeftConfig | None:
        if arguments.peft_method == "lora":
            arguments.use_peft, arguments.lora_task_type = True, task_type
            return get_peft_config(arguments)
        return method_config(arguments, task_type=task_type)

    trl.ModelConfig = make_dataclass("ModelConfig", [], bases=(MethodArguments, model_config))
    trl.get_peft_config = choose
    try:
        yield
    finally:
        trl.ModelConfig, trl.get_peft_config = model_config, get_peft_config


def run_script(name: str, arguments: list[str]) -> None:
    """Run one of TRL's scripts with this package's methods.

    Args:
        name: A key of `SCRIPTS`.
        arguments: Command line, without the script's name.

    Raises:
        EigenPeftError: If TRL is not installed, or EigenLoRA has no subspace.
    """
    if importlib.util.find_spec("trl") is None:
        raise EigenPeftError(
            f"`eigenpeft {name}` runs TRL's script, and trl is not installed: pip install 'eigenpeft[trl]'."
        )
    trl = importlib.import_module("trl")
    script = importlib.import_module(f"trl.scripts.{name}")
    # A reward model's new head must train and be saved, which PEFT does for this task type.
    with _our_methods_in(trl, task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM"):
        parser = script.make_parser(prog=f"eigenpeft {name}")
        script.main(*parser.parse_args_and_config(arguments, fail_with_unknown_args=True))


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        run_script(name, context.args)

    return command


for _name, _what in SCRIPTS.items():
    app.command(
        _name,
        help=f"{_what} with TRL's script: eigenpeft {_name} --help lists TRL's options and ours.\n\n"
        f"Example: accelerate launch -m eigenpeft {_name} --model_name_or_path BASE --dataset_name DATA --subspace subspace "
        "--output_dir out",
        add_help_option=False,  # --help is the script's own
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        rich_help_panel="Training (TRL)",
    )(_command(_name))
