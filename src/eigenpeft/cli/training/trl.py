"""The commands sft, dpo, kto, reward, grpo, rloo and distillation: TRL's own scripts with our adapters."""

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer

from eigenpeft.cli.app import app
from eigenpeft.cli.rows import check_there, looks_like_path
from eigenpeft.errors import EigenPeftError
from eigenpeft.tuners.learning_rates import settle_learning_rate, suggested_learning_rate

_logger = logging.getLogger(__name__)
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SCRIPTS = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "reward": "Reward modelling",
    "grpo": "Group relative policy optimisation",
    "rloo": "REINFORCE leave-one-out",
    "distillation": "On-policy distillation from a teacher",
}
_TRAINERS = {name: "Reward" if name == "reward" else name.upper() for name in SCRIPTS} | {
    "distillation": "Distillation"
}
_HELP = """{title} in a recycled subspace: TRL's own `{name}` script, its flags and ours.

Example: eigenpeft {name} --model_name_or_path MODEL --dataset_name DATA --subspace subspace --output_dir out

Flags of ours: --subspace, --n_components, --core, --init_from, --peft_method eigenlora|moslora|lora. For several
devices: accelerate launch -m eigenpeft {name} ...; for a file of flags: --config FILE.yaml. All flags: --help.
"""


def run_script(name: str, arguments: list[str]) -> None:
    """Parse the arguments as TRL's script does, with our model arguments in place of its own, and train.

    Args:
        name: Script, a key of `SCRIPTS`.
        arguments: What follows the command's name.

    Raises:
        EigenPeftError: If TRL is not installed, no data set is named, or the adapter's flags do not fit together.
    """
    if find_spec("trl") is None:
        raise EigenPeftError(f"'eigenpeft {name}' needs TRL, which is not installed: pip install 'eigenpeft[trl]'.")
    # TRL is an optional extra, so that nothing may import it when eigenpeft is imported.
    trl = importlib.import_module("trl")
    ours = importlib.import_module("eigenpeft.cli.training.trl_arguments")
    trained = importlib.import_module("eigenpeft.cli.training.trained")
    callbacks = importlib.import_module("eigenpeft.trainers.float32_callback")
    script = importlib.import_module(f"trl.scripts.{name}")
    # The scripts look these names up in `trl` when they run. Their arguments can only describe a LoraConfig, and their
    # trainers round what is trained over a quantised base.
    trainer = f"{_TRAINERS[name]}Trainer"
    replacements: dict[str, Any] = {
        "ModelConfig": ours.EigenModelConfig,
        "get_peft_config": ours.peft_config_from,
    }
    with _replaced(trl, replacements):
        parser = script.make_parser(prog=f"eigenpeft {name}")
        arguments = _for_this_machine(arguments)
        try:
            parsed = parser.parse_args_and_config(arguments)
        except ValueError as error:  # such as bf16 on a CPU without --use_cpu
            raise EigenPeftError(f"eigenpeft {name}: {error}") from error
        script_arguments, training, model_arguments, mixture = parsed
        if name == "reward":
            model_arguments.lora_task_type = "SEQ_CLS"  # PEFT then trains and saves the new score head too
        if not (script_arguments.dataset_name or mixture.datasets):
            raise EigenPeftError(
                "No data: pass --dataset_name a Hub id, a folder with train.jsonl or a file, or 'datasets' in the --config file."
            )
        _take_file(script_arguments, mixture)
        if ours.peft_config_from(model_arguments) is not None:  # says what is wrong before a model is loaded
            suggested = suggested_learning_rate(
                name,
                peft_method=model_arguments.peft_method,
                core=model_arguments.core,
                control=model_arguments.control,
            )
            settle_learning_rate(training, suggested=suggested, given=_names_a_rate(arguments, training))
        data = script_arguments.dataset_name or ", ".join(part.data_files or part.path for part in mixture.datasets)
        own = {"command": name, "title": SCRIPTS[name], "data": str(data)}
        speaking: Any = type(trainer, (trained.SaysWhatItTrains, getattr(trl, trainer)), own)
        with _replaced(trl, {trainer: partial(speaking, callbacks=[callbacks.Float32Callback()])}):
            script.main(*parsed)


def _for_this_machine(words: list[str]) -> list[str]:
    """With the CPU and float32 chosen where there is no accelerator, unless the words say what to train on."""
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-")}
    if torch.accelerator.is_available() or flags & {"use_cpu", "bf16", "fp16", "config", "help", "h"}:
        return words
    _logger.warning("No accelerator was found: training on the CPU in float32 (--use_cpu true --bf16 false).")
    return [*words, "--use_cpu", "true", "--bf16", "false"]


def _take_file(script_arguments: Any, mixture: Any) -> None:
    """A local file as the data set: the scripts load folders and Hub ids alone, and files as parts of a mixture."""
    name = script_arguments.dataset_name
    if mixture.datasets or not name:
        return
    if looks_like_path(name):
        check_there(Path(name).expanduser())
    if not Path(name).is_file():
        return
    kind = _FILES.get(Path(name).suffix)
    if kind is None:
        raise EigenPeftError(
            f"--dataset_name {name!r} is a file of no known kind; pass {', '.join(_FILES)}, or a folder."
        )
    part = importlib.import_module("trl.scripts.utils").DatasetConfig(path=kind, data_files=name)
    mixture.datasets, script_arguments.dataset_name = [part], None


def _names_a_rate(words: list[str], training: Any) -> bool:
    """Whether the user chose the learning rate, on the command line or in the file of --config."""
    default = type(training).__dataclass_fields__["learning_rate"].default
    named = any(word.partition("=")[0] in ("--learning_rate", "--learning-rate") for word in words)
    return named or training.learning_rate != default


@contextmanager
def _replaced(module: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in replacements}
    for name, value in replacements.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _add_command(name: str, title: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    # TRL's parser answers --help, since it knows the flags.
    @app.command(name, help=_HELP.format(name=name, title=title), context_settings=settings, add_help_option=False)
    def command(context: typer.Context) -> None:
        run_script(name, list(context.args))


for _name, _title in SCRIPTS.items():
    _add_command(_name, _title)
