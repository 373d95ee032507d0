"""Publish subspaces, stores, adapters and reward models, with cards that need no editing and files that others can load."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.plain_text import for_card, for_code
from eigenpeft.artifacts.reading import MAX_JSON_BYTES, is_folder, read_bytes, read_json
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.audit import AuditReport
from eigenpeft.collection.base_models import hub_id
from eigenpeft.collection.formats.settings import OWN_METHODS
from eigenpeft.errors import ArtifactError
from eigenpeft.report.audit_card import AUDIT_FIGURE, audit_section
from eigenpeft.report.audit_figure import audit_png
from eigenpeft.reward.artifact import storage as reward_files
from eigenpeft.reward.artifact.card import without_users
from eigenpeft.reward.artifact.model import LowRankRewardModel
from eigenpeft.reward.artifact.users import UserTable
from eigenpeft.subspace import AdapterStore, PrincipalSubspace

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CARD = "README.md"
_PAPERS = {
    "EIGENLORA": "EigenLoRAx, arXiv 2502.04700",
    "MOSLORA": "MoSLoRA, arXiv 2406.11909",
    "SHARDLORA": "MoS, arXiv 2410.00938",
    "LORA": "LoRA, arXiv 2106.09685",
}
_MODULES = "## Modules\n"  # heading in the card of a subspace
_STORE_TITLE = "\n# Adapter store of "  # in the card that a store writes
_UNFINISHED = "[More Information Needed]"  # in the card that PEFT writes


@dataclass(frozen=True)
class Publication:
    """What an upload would send.

    Attributes:
        kind: "subspace", "adapter store", "adapter" or "reward model".
        repo_id: `owner/name`.
        folder: Where the files are.
        files: Names of those that are sent besides the card; never checkpoints or optimizer states.
        card: Text of README.md.
        config: Text of adapter_config.json where it differs from the file, else None.
        made: Files that are sent besides and lie in no folder, by name: the figure of an audit.
    """

    kind: str
    repo_id: str
    folder: Path
    files: tuple[str, ...]
    card: str
    config: str | None = None
    made: Mapping[str, bytes] = field(default_factory=dict)


def prepare(
    folder: str | Path,
    *,
    repo_id: str,
    subspace: str | None = None,
    base_model: str | None = None,
    audit: AuditReport | None = None,
    license: str | None = None,
    with_users: bool = False,
) -> Publication:
    """Check a saved artifact and write its card; nothing is sent and nothing in the folder changes.

    Args:
        folder: Folder of a saved subspace, store, adapter or reward model.
        repo_id: `owner/name` on the Hub.
        subspace: Hub id that an adapter's config shall name as its subspace, in place of a local folder.
        base_model: Hub id that config and card shall name as the base model, in place of a local folder.
        audit: Audit of the adapters that a subspace or a store was built from; its table and figure go into the card.
        license: The Hub's id of the license that the card shall name ("apache-2.0"); None leaves what it says.
        with_users: Send the weights of a reward model's users too. They are data about people, so that the default sends the
            model with an empty table.

    Raises:
        ArtifactError: If the folder holds none of them, is damaged, or names a local folder that others do not have; if
            the audit is of other adapters; if `repo_id` is not OWNER/NAME; or if an option does not go with what the folder holds.
        EigenPeftError: If an audit is given and matplotlib is not installed.
        OSError, ValueError: If a file cannot be read, or is larger than such a file may be.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ArtifactError(f"repo_id={repo_id!r} is not OWNER/NAME on the Hub: {error}") from error
    is_reward_model = (folder / reward_files.CONFIG).is_file()
    given = (
        {"subspace": subspace, "base_model": base_model, "audit": audit}
        if is_reward_model
        else {"with_users": with_users}
    )
    if beside := [name for name, value in given.items() if value]:
        holds = "a reward model" if is_reward_model else "no reward model"
        raise ArtifactError(f"{str(folder)!r} holds {holds}; leave out {' and '.join(beside)}.")
    if is_reward_model:
        publication = _reward_model(folder, repo_id, with_users)
    else:
        publication = _of_adapters(folder, repo_id=repo_id, subspace=subspace, base_model=base_model, audit=audit)
    return publication if license is None else replace(publication, card=_licensed(publication.card, license))


def _of_adapters(
    folder: Path, *, repo_id: str, subspace: str | None, base_model: str | None, audit: AuditReport | None
) -> Publication:
    if (folder / _ADAPTER_CONFIG).is_file():
        if audit is not None:
            raise ArtifactError(f"{str(folder)!r} is one adapter; an audit goes with a subspace or a store.")
        return _adapter(folder, repo_id=repo_id, subspace=subspace, base_model=base_model)
    if (folder / storage.STORE.config_name).is_file():
        store = AdapterStore.from_pretrained(folder)  # checks format, bases and index
        for name in store.names:
            store[name]  # checks its hash
        card = _card_in(folder, storage.STORE.label)
        if _STORE_TITLE in card:  # members may have come since it was written
            card = store.card()
        return _artifact(
            folder,
            repo_id=repo_id,
            label=storage.STORE.label,
            files=store.files(),
            card=card,
            subspace=store.subspace,
            audit=audit,
            base_model=base_model,
        )
    if (folder / storage.SUBSPACE.config_name).is_file():
        opened, kind = PrincipalSubspace.from_pretrained(folder), storage.SUBSPACE  # checks format and hashes
        files = (kind.config_name, kind.tensors_name)
        card = _card_in(folder, kind.label)
        return _artifact(
            folder,
            repo_id=repo_id,
            label=kind.label,
            files=files,
            card=card,
            subspace=opened,
            audit=audit,
            base_model=base_model,
        )
    raise ArtifactError(
        f"{str(folder)!r} holds no {storage.SUBSPACE.config_name}, {storage.STORE.config_name}, {_ADAPTER_CONFIG} or "
        f"{reward_files.CONFIG}; pass the folder that save_pretrained or a trainer wrote."
    )


def _reward_model(folder: Path, repo_id: str, with_users: bool) -> Publication:
    """The basis, the classifier where there is one, and a table of users that is empty unless it was asked for."""
    model = LowRankRewardModel.from_pretrained(folder, load_backbone=False)  # checks format and hashes
    files = tuple(
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (_CARD, reward_files.USERS)
    )
    card, made = _card_in(folder, reward_files.KIND), {}
    if with_users:
        files += (reward_files.USERS,)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            UserTable(model.n_basis).save(Path(scratch, reward_files.USERS))
            made[reward_files.USERS] = Path(scratch, reward_files.USERS).read_bytes()
        card = without_users(card)
    return Publication(reward_files.KIND, repo_id, folder, files, _addressed(card, repo_id), made=made)


def _licensed(card: str, license: str) -> str:
    changed = ModelCard(card, ignore_metadata_errors=True)
    changed.data["license"] = license
    return str(changed)


def _card_in(folder: Path, label: str) -> str:
    card = _read_card(folder)
    if not card:
        raise ArtifactError(f"{str(folder)!r} has no {_CARD}; save the {label} again, which writes it.")
    return card


def _artifact(
    folder: Path,
    *,
    repo_id: str,
    label: str,
    files: tuple[str, ...],
    card: str,
    subspace: PrincipalSubspace,
    audit: AuditReport | None,
    base_model: str | None,
) -> Publication:
    made, old = {}, subspace.info.base_model_name_or_path
    if base_model is None and _is_local(old):
        raise ArtifactError(
            f"The {label} names the local base model {old!r}, which others do not have; pass base_model (--model), its Hub "
            "id."
        )
    if base_model is not None:
        name = storage.SUBSPACE.config_name
        config = read_json(folder / name)
        made[name] = (json.dumps(_with_base(config, base_model), indent=2) + "\n").encode()
        card = _card_with_base(card, old, base_model)
    if audit is not None:
        _check_audited(subspace, audit)
        card, made[AUDIT_FIGURE] = _with_audit(card, audit), audit_png(audit)
    return Publication(label, repo_id, folder, files, _addressed(card, repo_id), made=made)


def push(publication: Publication, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Upload as a model repository; returns the commit's address.

    Args:
        publication: From `prepare`.
        private: Visibility of a new repository.
        token: Hub token; None takes the logged-in one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name in publication.files:
            Path(scratch, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(publication.folder / name, Path(scratch) / name)
        Path(scratch, _CARD).write_text(publication.card, encoding="utf-8")
        for name, content in publication.made.items():
            Path(scratch, name).write_bytes(content)
        if publication.config is not None:
            Path(scratch, _ADAPTER_CONFIG).write_text(publication.config, encoding="utf-8")
        message = f"Upload {publication.kind}"
        return storage.push_folder(scratch, publication.repo_id, private=private, token=token, message=message)


def _adapter(folder: Path, *, repo_id: str, subspace: str | None, base_model: str | None) -> Publication:
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise ArtifactError(f"{str(folder)!r} has {_ADAPTER_CONFIG} but no {_ADAPTER_WEIGHTS}; save the adapter again.")
    try:
        config = read_json(folder / _ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"The {_ADAPTER_CONFIG} of {str(folder)!r} cannot be read ({error}); save the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise ArtifactError(
            f"The {_ADAPTER_CONFIG} of {str(folder)!r} holds {type(config).__name__} instead of a JSON object; save the adapter "
            "again."
        )
    given, old_base = dict(config), config.get("base_model_name_or_path")
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    elif _is_local(config.get("base_model_name_or_path")):
        raise ArtifactError(
            f"The adapter names the local base model {config['base_model_name_or_path']!r}, which others do not have; "
            "pass base_model, its Hub id."
        )
    if subspace is not None:
        config["subspace"], config["subspace_revision"] = subspace, None
    elif config.get("save_subspace") == "reference" and _is_local(config.get("subspace")):
        raise ArtifactError(
            f"The adapter names the local subspace {config['subspace']!r}, which others do not have; publish that first "
            'and pass subspace, its Hub id, or save the adapter with save_subspace="embed".'
        )
    card = _read_card(folder)
    if not card or _UNFINISHED in card:
        card = _adapter_card(folder, config)
    elif card.startswith("## "):  # nothing but the section that an export writes
        card = _adapter_card(folder, config).rstrip() + "\n\n" + card
    elif "eigenpeft" not in card:
        card = card.rstrip() + "\n\n" + _how_to_load(config)
    if base_model is not None:
        card = _card_with_base(card, old_base, base_model)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n" if config != given else None
    return Publication("adapter", repo_id, folder, (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS), _addressed(card, repo_id), text)


def _read_card(folder: Path) -> str:
    """The folder's README.md, empty where there is none."""
    if not (folder / _CARD).exists():
        return ""
    try:
        return read_bytes(folder / _CARD, limit=MAX_JSON_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"The {_CARD} of {str(folder)!r} cannot be read as UTF-8 text ({error}); save the artifact again, which writes it."
        ) from error


def _check_audited(subspace: PrincipalSubspace, audit: AuditReport) -> None:
    sources = {str(source.get("name")) for source in subspace.info.sources}
    others = [name for name in audit.adapters if name not in sources]
    if others:
        raise ArtifactError(
            f"The audit is of other adapters: {', '.join(map(repr, others[:5]))} ({len(others)} of {len(audit.adapters)}) are "
            "not among those that the subspace was built from. Audit the same folder."
        )


def _with_audit(card: str, audit: AuditReport) -> str:
    """The card with the audit before its list of modules, or at its end."""
    before, modules, after = card.partition(_MODULES)
    return f"{before.rstrip()}\n\n{audit_section(audit)}\n{modules}{after}".rstrip() + "\n"


def _with_base(config: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """A subspace's config with another base model, in the records of its sources too where these name a folder."""
    sources = [
        {**source, "base_model": base_model} if _is_local(source.get("base_model")) else source
        for source in config.get("sources", ())
    ]
    return {**config, "base_model_name_or_path": base_model, "sources": sources}


def _card_with_base(card: str, old: Any, base_model: str) -> str:
    """The card with another base model: in its metadata, and wherever it names the old one's folder."""
    for place in {old, ModelCard(card, ignore_metadata_errors=True).data.get("base_model")}:
        if _is_local(place):
            card = card.replace(place, base_model)
            card = card.replace(f"`{for_code(Path(place).name)}`, a local folder", f"`{base_model}`")
    changed = ModelCard(card, ignore_metadata_errors=True)
    changed.data["base_model"] = base_model
    return str(changed)


def _is_local(place: Any) -> bool:
    if not isinstance(place, str) or not place:
        return False
    return hub_id(place) is None or is_folder(place)


def _addressed(card: str, repo_id: str) -> str:
    return card.replace("<this repository or its local path>", repo_id)


def _how_to_load(config: Mapping[str, Any]) -> str:
    own = config.get("peft_type") in OWN_METHODS
    needs_us = own or config.get("requires_package") == "eigenpeft"
    wanted = "import eigenpeft  # pip install eigenpeft; makes the method known to PEFT\n" if needs_us else ""
    export = (
        '\nFor software that knows plain LoRA alone: `eigenpeft.export_lora(model, "plain-lora")` writes the same update '
        "as an ordinary LoRA adapter.\n"
        if own
        else ""
    )
    return f"""## How to load it

```python
{wanted}from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this repository or its local path>")
```
{export}"""


def _adapter_card(folder: Path, config: Mapping[str, Any]) -> str:
    shapes = TensorFile(folder / _ADAPTER_WEIGHTS, keep_open=False).shapes
    size = sum(math.prod(shape) for shape in shapes.values())
    method, base = str(config.get("peft_type")), config.get("base_model_name_or_path")
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        tags=["eigenpeft", method.lower(), "lora", *([f"base_model:adapter:{base}"] if base else [])],
    )
    fields = ("r", "lora_alpha", "core", "n_components", "subspace", "subspace_sha256", "init_mixer", "target_modules")
    rows = "\n".join(f"| {name} | `{_shown(config[name])}` |" for name in fields if config.get(name) is not None)
    body = f"""# {for_card(method)} adapter{f" of {for_card(base)}" if base else ""}

{size:,} numbers in {len(shapes)} tensors, trained with eigenpeft. Paper: {_PAPERS.get(method, "see PEFT's documentation")}.

{_how_to_load(config)}
## Configuration

| field | value |
|---|---|
{rows}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _shown(value: Any) -> str:
    return for_code(", ".join(sorted(map(str, value))) if isinstance(value, list) else value)
