"""The winner on disk: one plain LoRA folder that holds the merged start and what was trained on top of it."""

from pathlib import Path

from peft import PeftModel

from eigenpeft.artifacts.reading import read_json
from eigenpeft.collection.formats.labels import LABELS_NAME, label_file, label_names
from eigenpeft.tuners.files.export import contents_of_model
from eigenpeft.tuners.files.lora_files import CONFIG_NAME, WEIGHTS_NAME, write_lora


def write_result(model: PeftModel, folder: Path, *, base_model: str | None, card: str) -> None:
    """Write a plain LoRA: the update of the trained adapter, and the merged start where there is one (their ranks add up).

    Args:
        model: The trained model; its head is written too, and the names of its labels where its configuration has some.
        folder: Folder to make.
        base_model: Name that the adapter's config gets.
        card: Text of README.md; `write_lora` adds its section.

    Raises:
        ArtifactError: If the folder holds something that is not replaced, or cannot be written.
        AdapterConfigError: If a plain LoRA cannot express the adapter.
    """
    updates, fields, others = contents_of_model(model, "default")
    names = label_names(model.get_base_model().config)
    labels = {LABELS_NAME: label_file(names)} if names else {}
    write_lora(
        folder,
        updates=updates,
        fields={**fields, "base_model_name_or_path": base_model},
        others=others,
        files={"README.md": card.encode(), **labels},
        overwrite=True,
    )


def size_of_result(folder: Path) -> tuple[int, int]:
    """Rank of a plain LoRA that was written, and bytes of its weights file.

    Args:
        folder: That `write_result` made.

    Raises:
        OSError, ValueError: If its configuration cannot be read.
    """
    return int(read_json(folder / CONFIG_NAME)["r"]), (folder / WEIGHTS_NAME).stat().st_size
